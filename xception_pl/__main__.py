"""`python -m xception_pl`: the list of commands."""

COMMANDS = {
    "fit": "train what a recipe describes",
    "submit": "train it as a SLURM job, on one node or many",
    "evaluate": "exactly how good weights are, with a report to look at",
    "predict": "classes, features and heat maps of pictures",
    "export": "weights into ONNX, torch.export, Keras, timm or a hub folder, proven",
    "verify_resume": "prove here that a killed run resumes exactly",
    "reproduce": "each claim of the paper beside what finished runs measured",
    "ablate": "run and compare variants of a recipe over seeds",
    "spectrum": "cost of each number of channel segments, from Inception to Xception",
    "mirror": "copy a hub dataset to local Parquet, verified",
    "bench": "speed of training, inference and data beside other libraries and the machine's ceiling",
}


def main() -> None:
    print("usage: python -m xception_pl.COMMAND …; each takes --help\n")
    for name, text in COMMANDS.items():
        print(f"  python -m xception_pl.{name:<15}{text}")


if __name__ == "__main__":
    main()
