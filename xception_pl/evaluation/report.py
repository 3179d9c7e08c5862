"""`report.html`: one file without anything from elsewhere, for a person to look at."""

import base64
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template

from PIL import Image

from xception_pl.data.decode import DecodeError, open_image
from xception_pl.evaluation.charts import confusion_svg, reliability_svg
from xception_pl.evaluation.results import Evaluated, Evaluation, confusion_png
from xception_pl.evaluation.statistics import OfClass, confused_pairs, worst_classes

WORST, PAIRS, EXAMPLES, MISTAKES = 20, 12, 5, 18
NAMED_CLASSES = 40
"""Above so many classes the confusion matrix is a picture without names."""
_THUMBNAIL = 96  # pixels of the longer side

Bytes = Callable[[Sequence[int]], list[bytes]]
"""The encoded images of rows."""


def report_html(evaluation: Evaluation, images: Bytes) -> str:
    """The whole page.

    Args:
        evaluation: what was found.
        images: gives the encoded images of rows, for the examples.
    """
    first = evaluation.networks[0]
    several = len(evaluation.networks) > 1
    sections = [_comparison(evaluation)] if several else []
    for network in evaluation.networks:
        heading = f'<h2 class="network">{_(network.weights)}</h2>' if several else ""
        sections.append(heading + _network(network, images))
    template = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=_(f"{Path(first.weights).name} on {evaluation.where}"),
        heading=_(f"{len(evaluation.networks)} networks" if several else first.network),
        where=_(evaluation.where),
        weights="" if several else _(first.weights),
        body="\n".join(sections),
        left_out=_left_out(evaluation),
        measured=_measured(evaluation),
    )


def _(text: object) -> str:
    return html.escape(str(text))


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{share * 100:.{digits}f} %"


def _network(network: Evaluated, images: Bytes) -> str:
    found, (low, high) = network.summary, network.summary.top1_interval
    tiles = [
        ("top-1", _percent(found.top1, 2), f"95 % interval {_percent(low, 2)} to {_percent(high, 2)}"),
        ("top-5", _percent(found.top5, 2), f"{found.images:,} images"),
        ("loss", f"{found.loss:.4f}", "mean over the images, nats"),
        ("calibration error", _percent(found.ece, 2), _confidence_words(network)),
    ]
    cards = "".join(
        f'<div class="tile"><span>{name}</span><b>{value}</b><small>{_(text)}</small></div>'
        for name, value, text in tiles
    )
    note = f'<p class="note">{_(network.note)}</p>' if network.note else ""
    if len(network.class_names) <= NAMED_CLASSES:
        matrix = confusion_svg(network.confusion, network.class_names)
    else:
        matrix = f'<img class="matrix" alt="confusion matrix" src="{_uri(confusion_png(network), "png")}">'
    return f"""
<div class="tiles">{cards}</div>{note}
<div class="two">
  <section><h3>Reliability</h3>{reliability_svg(found.reliability)}
    <p>Bars: share of right answers among images of that confidence. On the diagonal, confidence can be taken at its word;
    below it the network is too sure (orange), above it
    too modest (pale). The strip shows where the images are.</p></section>
  <section><h3>Confusion</h3>{matrix}
    <p>Each row shares out one class' images over what they were taken for.</p></section>
</div>
<section><h3>Worst classes</h3>{_worst(network)}</section>
<section><h3>Most confused</h3>{_pairs(network, images)}</section>
<section><h3>Most confident mistakes</h3>{_mistakes(network, images)}</section>
<details><summary>All {len(found.classes):,} classes</summary>{_class_table(network, found.classes, sortable=True)}</details>
<p class="prepared"><b>Prepared</b> {_(network.preprocessing)}.</p>
"""


def _confidence_words(network: Evaluated) -> str:
    confidence = float(network.scores.probabilities[:, 0].mean())
    gap = confidence - network.summary.top1
    return f"mean confidence {_percent(confidence)}: {'too sure' if gap > 0 else 'too modest'} by {abs(gap) * 100:.1f} points"


def _worst(network: Evaluated) -> str:
    return _class_table(network, worst_classes(network.summary.classes, WORST))


def _class_table(network: Evaluated, classes: Sequence[OfClass], *, sortable: bool = False) -> str:
    rows = []
    for item in classes:
        mistakes = network.confusion[item.index].copy()
        mistakes[item.index] = 0
        most = int(mistakes.argmax())
        taken = f"{_(network.class_names[most])} ({mistakes[most]:,})" if mistakes[most] else "–"
        accuracy = item.accuracy if item.accuracy is not None else -1.0
        bar = f'<i class="bar" style="--share:{max(accuracy, 0):.4f}"></i>'
        rows.append(
            f"<tr><td>{_(network.class_names[item.index])}</td>"
            f'<td class="n" data-value="{accuracy}">{bar}{_percent(item.accuracy)}</td>'
            f'<td class="n" data-value="{-1 if item.precision is None else item.precision}">{_percent(item.precision)}</td>'
            f'<td class="n" data-value="{item.images}">{item.images:,}</td><td>{taken}</td></tr>'
        )
    kind = ' class="sortable"' if sortable else ""
    head = "<tr><th>class</th><th>top-1</th><th>precision</th><th>images</th><th>most often taken for</th></tr>"
    return f'<div class="wide"><table{kind}><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _pairs(network: Evaluated, images: Bytes) -> str:
    pairs = confused_pairs(network.scores, network.confusion, PAIRS)
    if not pairs:
        return "<p>No image was taken for another class.</p>"
    cards = []
    for pair in pairs:
        rows = pair.ids[:EXAMPLES]
        shown = "".join(_thumbnail(data, f"row {row}") for row, data in zip(rows, images(rows), strict=True))
        of = int(network.confusion[pair.label].sum())
        cards.append(
            f'<div class="pair"><p><b>{_(network.class_names[pair.label])}</b> taken for '
            f"<b>{_(network.class_names[pair.predicted])}</b></p><small>{pair.images:,} of {of:,} images</small>"
            f'<div class="strip">{shown}</div></div>'
        )
    return f'<div class="pairs">{"".join(cards)}</div>'


def _mistakes(network: Evaluated, images: Bytes) -> str:
    scores = network.scores
    wrong = [i for i in (-scores.probabilities[:, 0]).argsort(kind="stable").tolist() if not scores.correct[i]][
        :MISTAKES
    ]
    if not wrong:
        return "<p>There is none.</p>"
    found = images([int(scores.ids[i]) for i in wrong])
    cards = [
        f"<figure>{_thumbnail(data, f'row {scores.ids[i]}')}<figcaption>{_(network.class_names[scores.labels[i]])}"
        f"<small>{_(network.class_names[scores.predicted[i]])}, {scores.probabilities[i, 0] * 100:.1f} %</small></figcaption></figure>"
        for i, data in zip(wrong, found, strict=True)
    ]
    return f'<p>The label, and below it what the network said.</p><div class="gallery">{"".join(cards)}</div>'


def _thumbnail(data: bytes, title: str) -> str:
    try:
        image = open_image(data, 3)
    except DecodeError:  # it was decoded a moment ago: the source is changing under us
        return f'<span class="gone" title="{_(title)}">?</span>'
    scale = _THUMBNAIL / max(image.size)
    filter_ = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    file = io.BytesIO()
    image.resize(size, filter_).save(file, "JPEG", quality=85)
    return (
        f'<img class="thumb" loading="lazy" title="{_(title)}" alt="{_(title)}" src="{_uri(file.getvalue(), "jpeg")}">'
    )


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _comparison(evaluation: Evaluation) -> str:
    head = "<tr><th>weights</th><th>top-1</th><th>top-5</th><th>loss</th><th>against the first</th><th>p</th></tr>"
    rows = []
    for network, pair in zip(evaluation.networks, [None, *evaluation.compared()], strict=True):
        found = network.summary
        against, p = "", ""
        if pair is not None:
            low, high = pair.interval
            against = f"{pair.difference * 100:+.2f} points ({low * 100:+.2f} to {high * 100:+.2f})"
            p = f"{pair.p_value:.3g}"
        rows.append(
            f'<tr><td>{_(network.weights)}</td><td class="n">{_percent(found.top1, 2)}</td>'
            f'<td class="n">{_percent(found.top5, 2)}</td><td class="n">{found.loss:.4f}</td>'
            f'<td class="n">{against}</td><td class="n">{p}</td></tr>'
        )
    return (
        f'<section><h3>Compared, image by image</h3><div class="wide"><table><thead>{head}</thead><tbody>{"".join(rows)}'
        "</tbody></table></div><p>In brackets 95 % intervals. p is McNemar's exact test: how often two equally good "
        "networks would disagree at least so unevenly.</p></section>"
    )


def _left_out(evaluation: Evaluation) -> str:
    parts = []
    if evaluation.excluded:
        parts.append(f"<p>{evaluation.excluded:,} images were excluded by the list given.</p>")
    if evaluation.corrupt:
        rows = "".join(f"<li>row {image.row}: {_(image.reason)}</li>" for image in evaluation.corrupt)
        count = len(evaluation.corrupt)
        parts.append(
            f"<details><summary>{count:,} images cannot be decoded and do not count</summary><ul>{rows}</ul></details>"
        )
    return "".join(parts)


def _measured(evaluation: Evaluation) -> str:
    return _(
        f"{evaluation.images:,} images in the split; {evaluation.images_per_second:,.1f} images/s with loading on "
        f"{evaluation.hardware}. Intervals of top-1 are Wilson's."
    )
