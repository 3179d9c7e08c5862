/* Xception's layers on the processor: float32, channels last (B, H, W, C), any sizes and channel counts.
 *
 * A layer is one matrix product whose left-hand side is made a tile of pixels at a time in the second-level cache and
 * never written to memory: the depthwise convolution of a normalised and rectified input, the pixels of a 1 x 1 or the
 * patches of a 3 x 3 convolution, or the gradient behind a batch norm. What follows the product (an affine map, the
 * shortcut, the statistics of the next batch norm) happens on the tile too.
 *
 * Work is cut by the shapes alone and partial sums are added in a fixed order, so that results do not depend on the
 * number of threads.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#ifndef WIDTH
#if defined(__AVX512F__)
#define WIDTH 16
#else
#define WIDTH 8
#endif
#endif
#define ROWS 6             /* of the micro-kernel: with 2 vectors of columns its 12 sums stay in registers */
#define PANEL (2 * WIDTH)  /* columns of the micro-kernel */
#define inline_always static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef float vec_loose __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t mask __attribute__((vector_size(4 * WIDTH)));

/* `lanes` is WIDTH, a constant, but for the last channels. */
inline_always vec load(const float *from, int lanes) {
  if (lanes >= WIDTH) return *(const vec_loose *)from;
  vec v = {0};
  for (int i = 0; i < lanes; i++) v[i] = from[i];
  return v;
}
inline_always void store(float *to, vec v, int lanes) {
  if (lanes >= WIDTH)
    *(vec_loose *)to = v;
  else
    for (int i = 0; i < lanes; i++) to[i] = v[i];
}
/* Past the cache, to an aligned address: for maps larger than it, of which nothing should be read before it is written. */
inline_always void stream(float *to, vec v) {
#if WIDTH == 8 && defined(__AVX__)
  _mm256_stream_ps(to, (__m256)v);
#else
  store(to, v, WIDTH);
#endif
}
inline_always vec splat(float x) { return x - (vec){0}; } /* one instruction; x + 0 would be two, because of -0 */
inline_always vec choose(mask which, vec yes, vec no) {
#if WIDTH == 8 && defined(__AVX__)
  return (vec)_mm256_blendv_ps((__m256)no, (__m256)yes, (__m256)which);
#else
  return (vec)((which & (mask)yes) | (~which & (mask)no));
#endif
}
/* The larger; `v` where it is not a number, as in torch. */
inline_always vec at_least(vec floor, vec v) {
#if WIDTH == 8 && defined(__AVX__)
  return (vec)_mm256_max_ps((__m256)floor, (__m256)v);
#elif WIDTH == 16 && defined(__AVX512F__)
  return (vec)_mm512_max_ps((__m512)floor, (__m512)v);
#else
  return choose(v < floor, floor, v);
#endif
}
inline_always int smaller(int a, int b) { return a < b ? a : b; }
inline_always int larger(int a, int b) { return a > b ? a : b; }
inline_always int over(int a, int b) { return (a + b - 1) / b; } /* a / b, rounded up */

/* Run the last argument for each vector of channels in [from, to) with `c` and `lanes`; whole vectors get a constant. */
#define EACH_VECTOR(from, to, ...)                                      \
  for (int c = (from), once = 1; once; once = 0) {                      \
    for (; c + WIDTH <= (to); c += WIDTH) { enum { lanes = WIDTH }; __VA_ARGS__ } \
    if (c < (to)) { int lanes = (to) - c; __VA_ARGS__ }                 \
  }

enum kind { POINTS, DEPTHWISE, PATCHES, GRADIENT };

/* The left-hand side of a product: one row for each pixel of the output. */
struct left {
  int kind;
  int batch, height, width, channels; /* of the input */
  int out_height, out_width, stride, padding, dilation;
  const float *in;
  const float *scale, *shift; /* a channel each: the input is read as max(in * scale + shift, floor); NULL for 1 and 0 */
  float floor;
  const float *depthwise;             /* DEPTHWISE: (9, channels) */
  const float *normed, *mean, *slope; /* GRADIENT: in * scale + (normed - mean) * slope + shift */
};

/* What happens to the product before it is written. */
struct right {
  int columns;
  const float *packed; /* from pack() */
  float *out;
  const float *scale, *shift; /* out = max(product * scale + shift + added, floor) */
  const float *added;
  float floor;
  float *moments; /* (tiles, 2, columns): mean and sum of squared deviations over a tile; or NULL */
};

static int depth(const struct left *l) { return l->kind == PATCHES ? 9 * l->channels : l->channels; }
static int pixels(const struct left *l) { return l->batch * l->out_height * l->out_width; }

/* Floats in a vector of the processor that this was compiled for; 0 where it has none of eight. */
int vectors(void) {
#if defined(__AVX2__) && defined(__FMA__)
  return WIDTH;
#else
  return 0;
#endif
}

/* Pixels of a tile: as many as leave its left-hand side room in the second-level cache, the same number in each. */
int tile_pixels(int count, int depth) {
  int most = larger(24, smaller(96, 40960 / depth));
  int tiles = over(count, most);
  return over(over(count, tiles), ROWS) * ROWS;
}

/* ---- Left-hand sides. Vectors of channels from `c` go to out + place(c) + pixel * step. ---- */

struct tile {
  float *at;
  long step;  /* floats from a pixel to the next */
  long panel; /* floats from one panel of PANEL columns to the next; 0 where a row lies together */
  int first;  /* column that comes first */
};
inline_always float *place(const struct tile *t, int column) {
  column -= t->first;
  return t->panel ? t->at + column / PANEL * t->panel + column % PANEL : t->at + column;
}

enum { AHEAD = 12 }; /* columns */

/* Pixels [x0, x1) of row y of a depthwise 3 x 3 convolution, for `group` vectors of channels: a line of the cache at a
 * time. Every column of the input is read once for each row of the kernel, and takes part in the three sums that it
 * belongs to. */
inline_always void depthwise_group(const struct left *l, const float *image, int y, int x0, int x1, float *out,
                                   long step, int c, int lanes, int group) {
  int C = l->channels, W = l->width, d = l->dilation;
  const vec zero = {0}, floor = splat(l->floor);
  vec scale[2], shift[2], w[3][3][2], now[2], next[2];
  const float *row[3];
  for (int i = 0; i < 3; i++) {
    int at = y + (i - 1) * d, inside = at >= 0 && at < l->height;
    row[i] = image + (long)(inside ? at : y) * W * C + c; /* a row outside counts nothing: its weights are zero */
    for (int j = 0; j < 3; j++)
      for (int n = 0; n < group; n++)
        w[i][j][n] = inside ? load(l->depthwise + (3 * i + j) * C + c + n * WIDTH, lanes) : zero;
  }
  for (int n = 0; n < group; n++) {
    scale[n] = l->scale ? load(l->scale + c + n * WIDTH, lanes) : splat(1);
    shift[n] = l->scale ? load(l->shift + c + n * WIDTH, lanes) : zero;
  }
#define COLUMN(x) \
  for (int i = 0; i < 3; i++) v[i] = at_least(floor, load(row[i] + (long)(x) * C + n * WIDTH, lanes) * scale[n] + shift[n]);
#define SUM(j) (v[0] * w[0][j][n] + v[1] * w[1][j][n] + v[2] * w[2][j][n])
  for (int start = x0; start < smaller(x0 + d, x1); start++) {
    vec v[3]; /* `now` and `next` are the sums of pixels x and x + d */
    for (int n = 0; n < group; n++) {
      now[n] = zero;
      if (start - d >= 0) {
        COLUMN(start - d)
        now[n] = SUM(0);
      }
      COLUMN(start)
      now[n] += SUM(1);
      next[n] = SUM(0);
    }
    int x = start;
    for (; x < x1 && x + d < W; x += d) { /* the lines that come some columns later, or in the next vectors of channels */
      long far = x + AHEAD < x1 ? (long)(x + AHEAD) * C : (long)(x + AHEAD - (x1 - x0)) * C + group * WIDTH;
      for (int i = 0; i < 3; i++) __builtin_prefetch(row[i] + far);
#pragma GCC unroll 2
      for (int n = 0; n < group; n++) {
        COLUMN(x + d)
        store(out + (x - x0) * step + n * WIDTH, now[n] + SUM(2), lanes);
        now[n] = next[n] + SUM(1);
        next[n] = SUM(0);
      }
    }
    if (x < x1)
      for (int n = 0; n < group; n++) store(out + (x - x0) * step + n * WIDTH, now[n], lanes);
  }
#undef COLUMN
#undef SUM
}

static void depthwise(const struct left *l, const float *image, int y, int x0, int x1, const struct tile *t, int pixel,
                      int from, int to) {
  int rest = from;
  for (; rest + PANEL <= to; rest += PANEL)
    depthwise_group(l, image, y, x0, x1, place(t, rest) + pixel * t->step, t->step, rest, WIDTH, 2);
  EACH_VECTOR(rest, to, {
    depthwise_group(l, image, y, x0, x1, place(t, c) + pixel * t->step, t->step, c, lanes, 1);
  });
}

/* The patch that one output pixel sees, or for a 1 x 1 convolution the pixel itself. */
static void patch(const struct left *l, const float *image, int y, int x, const struct tile *t, int pixel, int from,
                  int to) {
  int C = l->channels, side = l->kind == PATCHES ? 3 : 1, plain = !t->panel && !l->scale && l->floor == -INFINITY;
  const vec floor = splat(l->floor);
  for (int tap = 0; tap < side * side; tap++) {
    int iy = y * l->stride - l->padding + tap / side, ix = x * l->stride - l->padding + tap % side;
    int inside = iy >= 0 && iy < l->height && ix >= 0 && ix < l->width, base = tap * C;
    const float *in = image + ((long)iy * l->width + ix) * C;
    int low = larger(from, base) - base, high = smaller(to, base + C) - base;
    if (plain && inside && low < high) {
      int taps = 1; /* that lie together in memory */
      if (tap % side == 0 && ix + side <= l->width && high == C) taps = smaller(side, (to - base) / C);
      memcpy(place(t, base + low) + pixel * t->step, in + low, sizeof(float) * (size_t)(taps * C - low + high - C));
      tap += taps - 1;
      continue;
    }
    for (int c = low; c < high;) { /* vectors end where a panel of columns ends */
      int lanes = smaller(WIDTH, high - c);
      if (t->panel) lanes = smaller(lanes, WIDTH - (base + c - t->first) % WIDTH);
      float *out = place(t, base + c) + pixel * t->step;
      if (lanes == WIDTH) {
        vec v = inside ? load(in + c, WIDTH) : splat(0);
        if (inside && l->scale) v = v * load(l->scale + c, WIDTH) + load(l->shift + c, WIDTH);
        store(out, inside ? at_least(floor, v) : v, WIDTH);
      } else
        for (int i = 0; i < lanes; i++) {
          float v = inside ? in[c + i] : 0;
          if (inside && l->scale) v = v * l->scale[c + i] + l->shift[c + i];
          out[i] = inside && v < l->floor ? l->floor : v;
        }
      c += lanes;
    }
  }
}

/* Fill a tile with columns [from, to) of the rows of `count` pixels from number `first` on. */
static void fill(const struct left *l, int first, int count, const struct tile *t, int from, int to) {
  if (l->kind == GRADIENT) {
    const float *in = l->in + (long)first * l->channels, *normed = l->normed + (long)first * l->channels;
    for (int p = 0; p < count; p++) /* along the memory: a vector of every pixel first would fall into few lines */
      EACH_VECTOR(from, to, {
        long at = (long)p * l->channels + c;
        if (c % PANEL == 0) __builtin_prefetch(in + at + 2L * l->channels), __builtin_prefetch(normed + at + 2L * l->channels);
        vec off = load(normed + at, lanes) - load(l->mean + c, lanes);
        vec base = off * load(l->slope + c, lanes) + load(l->shift + c, lanes);
        store(place(t, c) + p * t->step, load(in + at, lanes) * load(l->scale + c, lanes) + base, lanes);
      });
    return;
  }
  long image = (long)l->height * l->width * l->channels;
  for (int p = 0; p < count;) {
    int x = (first + p) % l->out_width, y = (first + p) / l->out_width;
    const float *in = l->in + y / l->out_height * image;
    int end = smaller(l->out_width, x + count - p); /* of this row of the output */
    y %= l->out_height;
    if (l->kind == DEPTHWISE)
      depthwise(l, in, y, x, end, t, p, from, to);
    else
      for (int i = x; i < end; i++) patch(l, in, y, i, t, p + i - x, from, to);
    p += end - x;
  }
}

/* ---- Products ---- */

enum { LARGE = 1 << 21 }; /* floats of a map that is larger than what the caches should give to it */
enum { CHUNK = 128 }; /* pixels over which a gradient of weights is summed at a time */

/* ROWS x PANEL sums over `count` steps; a step moves `a` by `forward` and its rows lie `apart`. What lies at `next`, `each`
 * floats a step, is fetched into the second-level cache meanwhile. */
inline_always void multiply(int count, const float *a, long apart, long forward, const float *b, const float *next,
                            int each, float *out, int add) {
  vec sum[ROWS][2];
  for (int i = 0; i < ROWS; i++) sum[i][0] = sum[i][1] = (vec){0};
#pragma GCC unroll 8
  for (int k = 0; k < count; k++) {
    vec left = *(const vec_loose *)b, right = *(const vec_loose *)(b + WIDTH);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
      vec x = splat(a[i * apart]);
      sum[i][0] += x * left;
      sum[i][1] += x * right;
    }
    __builtin_prefetch(next, 0, 2);
    next += each;
    a += forward;
    b += PANEL;
  }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; i++) {
    vec *to = (vec *)(out + i * PANEL);
    to[0] = add ? to[0] + sum[i][0] : sum[i][0];
    to[1] = add ? to[1] + sum[i][1] : sum[i][1];
  }
}
/* Memory that is fetched into the second-level cache a share at a time. */
struct fetch {
  const float *at, *end;
  long share;
};
/* ROWS rows of a panel of the product, which meanwhile fetch what lies at `next`, `each` floats a step, and a share of
 * `soon`. */
static __attribute__((noinline)) void multiply_rows(int depth, const float *a, long step, const float *b,
                                                    const float *next, int each, float *out, struct fetch *soon) {
  const float *end = soon->end - soon->at > soon->share ? soon->at + soon->share : soon->end;
  for (; soon->at < end; soon->at += PANEL) __builtin_prefetch(soon->at, 0, 2);
  multiply(depth, a, step, 1, b, next, each, out, 0);
}
/* `count` sums of columns of `a`; those that lie behind `out` come next. */
static __attribute__((noinline)) void multiply_columns(int count, const float *a, long step, const float *b, float *out,
                                                       int add) {
  if (count == CHUNK) /* a constant: its loop has no rest */
    multiply(CHUNK, a, 1, step, b, out + ROWS * PANEL, 1, out, add);
  else
    multiply(count, a, 1, step, b, out + ROWS * PANEL, 1, out, add);
}

/* The right-hand side of a product in panels of PANEL columns, row by row, with zeros after the last column.
 * Element (k, n) of it is in[k * row + n * column]. */
void pack(const float *in, long row, long column, int depth, int columns, float *out, int threads) {
  int panels = over(columns, PANEL);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int panel = 0; panel < panels; panel++) {
    float *to = out + (long)panel * depth * PANEL;
    int n0 = panel * PANEL, wide = smaller(PANEL, columns - n0);
    if (column == 1 && wide == PANEL) {
      for (int k = 0; k < depth; k++) memcpy(to + k * PANEL, in + k * row + n0, sizeof(float) * PANEL);
      continue;
    }
    if (wide < PANEL) memset(to, 0, sizeof(float) * (size_t)depth * PANEL);
    for (int k0 = 0; k0 < depth; k0 += PANEL) /* in squares: either side may be the one that lies together */
      for (int n = 0; n < wide; n++)
        for (int k = k0; k < smaller(depth, k0 + PANEL); k++) to[k * PANEL + n] = in[k * row + (n0 + n) * column];
  }
}
int packed_floats(int depth, int columns) { return over(columns, PANEL) * depth * PANEL; }

/* Write `group` vectors of a panel of the product, `rows` of them from pixel `first` on. */
inline_always void finish(const struct right *r, const float *sums, int first, int rows, int c, int lanes, int group,
                          int streamed) {
  const vec floor = splat(r->floor);
  vec scale[2], shift[2];
  for (int n = 0; n < group; n++) {
    scale[n] = r->scale ? load(r->scale + c + n * WIDTH, lanes) : splat(1);
    shift[n] = r->scale ? load(r->shift + c + n * WIDTH, lanes) : splat(0);
  }
  long at = (long)first * r->columns + c;
  for (int p = 0; p < rows; p++, at += r->columns)
    for (int n = 0; n < group; n++) {
      vec v = load(sums + p * PANEL + n * WIDTH, WIDTH);
      if (r->scale) v = v * scale[n] + shift[n];
      if (r->added) v += load(r->added + at + n * WIDTH, lanes);
      v = at_least(floor, v);
      if (streamed)
        stream(r->out + at + n * WIDTH, v);
      else
        store(r->out + at + n * WIDTH, v, lanes);
    }
}

/* The moments of `group` vectors of a panel, over a tile of `rows`. */
inline_always void note_moments(const struct right *r, const float *sums, int rows, int tile, int c, int lanes,
                                int group) {
  vec mean[2][2] = {0}, squares[2][2] = {0}; /* of even and odd rows: a sum waits for itself */
  int even = rows / 2 * 2;
#define EACH_ROW(...)                                                                                       \
  for (int p = 0; p < even; p += 2)                                                                         \
    for (int i = 0; i < 2; i++)                                                                             \
      for (int n = 0; n < group; n++) { vec v = load(sums + (p + i) * PANEL + n * WIDTH, WIDTH); __VA_ARGS__ } \
  for (int i = 0; even < rows && i < 1; i++)                                                                \
    for (int n = 0; n < group; n++) { vec v = load(sums + even * PANEL + n * WIDTH, WIDTH); __VA_ARGS__ }
  EACH_ROW(mean[i][n] += v;)
  for (int n = 0; n < group; n++) mean[0][n] = (mean[0][n] + mean[1][n]) * splat(1.0f / (float)rows);
  EACH_ROW(v -= mean[0][n]; squares[i][n] += v * v;)
#undef EACH_ROW
  for (int n = 0; n < group; n++) {
    store(r->moments + (2L * tile) * r->columns + c + n * WIDTH, mean[0][n], lanes);
    store(r->moments + (2L * tile + 1) * r->columns + c + n * WIDTH, squares[0][n] + squares[1][n], lanes);
  }
}

/* What the tile of `rows` pixels from `first` on reads that those before it did not, in as many shares as `times`. */
static struct fetch new_input(const struct left *l, long first, int rows, int times) {
  struct fetch f = {0};
  if (l->kind == PATCHES || l->stride > 1 || first >= pixels(l)) return f;
  long down = l->kind == DEPTHWISE ? (long)l->dilation * l->width : 0, last = (long)l->batch * l->height * l->width;
  long from = first + down < last ? first + down : last, to = from + rows < last ? from + rows : last;
  f.at = l->in + from * l->channels, f.end = l->in + to * l->channels;
  f.share = ((f.end - f.at) / times / PANEL + 1) * PANEL;
  return f;
}

static void *room(size_t floats) { return aligned_alloc(64, (sizeof(float) * floats + 63) / 64 * 64); }

/* out = left x packed, and what `right` adds. Returns 0, or 1 when memory is short. */
int product(const struct left *l, const struct right *r, int threads) {
  int K = depth(l), count = pixels(l), rows = tile_pixels(count, K), tiles = over(count, rows);
  int panels = over(r->columns, PANEL), failed = 0, taken = 0;
  /* Where tiles are few, several threads take a share of the columns of each, and each makes its left-hand side. */
  int shares = larger(1, smaller(panels / 4, over(4 * threads, tiles)));
  int streamed = (long)count * r->columns > LARGE && r->columns % PANEL == 0 && (uintptr_t)r->out % 64 == 0;
  long step = K + WIDTH; /* rows that lie a power of two apart would evict each other */
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    float *left = room((size_t)rows * step), *sums = room((size_t)rows * PANEL);
    struct tile t = {left, step, 0, 0};
    failed = !left || !sums;
    if (!failed) memset(left, 0, sizeof(float) * (size_t)rows * step);
    int next; /* taken before it is needed, so that its input can be fetched */
#pragma omp atomic capture
    next = taken++;
    while (!failed && next < tiles * shares) {
      int task = next;
#pragma omp atomic capture
      next = taken++;
      int tile = task / shares, share = task % shares, first = tile * rows, here = smaller(rows, count - first);
      fill(l, first, here, &t, 0, K);
      struct fetch soon = new_input(l, (long)(next / shares) * rows, rows, panels / shares * over(here, ROWS));
      for (int panel = share * panels / shares; panel < (share + 1) * panels / shares; panel++) {
        const float *b = r->packed + (long)panel * K * PANEL;
        int column = panel * PANEL, whole = column + PANEL <= r->columns, groups = over(here, ROWS);
        for (int g = 0; g < groups; g++) {
          int row = g * ROWS, some = smaller(ROWS, here - row);
          float *out = sums + row * PANEL;
          for (int i = 0; i < some && !streamed; i++) { /* lines that the writing will need */
            long last = (long)(first + row + i) * r->columns + column + PANEL - 1;
            if (r->added) __builtin_prefetch(r->added + last);
            __builtin_prefetch(r->out + last, 1);
          }
          const float *share_of_next = b + (long)K * PANEL * (groups + g) / groups;
          multiply_rows(K, left + row * step, step, b, share_of_next, over(PANEL, groups), out, &soon);
          /* At once: what is written waits for memory while the next rows are multiplied. */
          if (whole && streamed)
            finish(r, out, first + row, some, column, WIDTH, 2, 1);
          else if (whole)
            finish(r, out, first + row, some, column, WIDTH, 2, 0);
          else
            EACH_VECTOR(column, r->columns, { finish(r, out + c % PANEL, first + row, some, c, lanes, 1, 0); });
        }
        if (r->moments && whole)
          note_moments(r, sums, here, tile, column, WIDTH, 2);
        else if (r->moments)
          EACH_VECTOR(column, r->columns, { note_moments(r, sums + c % PANEL, here, tile, c, lanes, 1); });
      }
    }
    free(left);
    free(sums);
  }
  return failed;
}

/* Mean and variance (biased) of each channel from the moments of a product's tiles. */
void join_moments(const float *moments, int count, int rows, int channels, float *mean, float *variance,
                  int threads) {
  int tiles = over(count, rows);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int from = 0; from < channels; from += 64) { /* along the memory */
    double sum[64] = {0}, squares[64] = {0};
    int here = smaller(64, channels - from);
    for (int tile = 0; tile < tiles; tile++)
      for (int i = 0; i < here; i++)
        sum[i] += moments[2L * tile * channels + from + i] * (double)smaller(rows, count - tile * rows);
    for (int i = 0; i < here; i++) sum[i] /= count;
    for (int tile = 0; tile < tiles; tile++)
      for (int i = 0; i < here; i++) {
        double off = moments[2L * tile * channels + from + i] - sum[i];
        squares[i] += moments[(2L * tile + 1) * channels + from + i] + off * off * smaller(rows, count - tile * rows);
      }
    for (int i = 0; i < here; i++) mean[from + i] = (float)sum[i], variance[from + i] = (float)(squares[i] / count);
  }
}

/* ---- Pooling ---- */

struct pool {
  int batch, height, width, channels, out_height, out_width, stride, top, left, dilation;
  const float *in, *scale, *shift;          /* pooled: in * scale + shift; NULL for 1 and 0 */
  const float *added, *added_scale, *added_shift; /* of the output's shape, or NULL */
};

/* The taps of a window that lie on the map: their places in it, in order. Returns how many. */
static int window(const struct pool *o, int y, int x, long *places) {
  int found = 0;
  for (int tap = 0; tap < 9; tap++) {
    int iy = y * o->stride - o->top + tap / 3 * o->dilation, ix = x * o->stride - o->left + tap % 3 * o->dilation;
    if (iy >= 0 && iy < o->height && ix >= 0 && ix < o->width)
      places[found++] = ((long)iy * o->width + ix) * o->channels;
  }
  return found;
}

void pool(const struct pool *o, float *out, int threads) {
  int C = o->channels;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int row = 0; row < o->batch * o->out_height; row++) {
    const float *image = o->in + row / o->out_height * ((long)o->height * o->width * C);
    for (int x = 0; x < o->out_width; x++) {
      long place = ((long)row * o->out_width + x) * C, places[9];
      int taps = window(o, row % o->out_height, x, places);
      EACH_VECTOR(0, C, {
        vec scale = o->scale ? load(o->scale + c, lanes) : splat(1), best = splat(-INFINITY);
        vec shift = o->scale ? load(o->shift + c, lanes) : splat(0);
        mask none = {0}; /* a number in the window */
        for (int tap = 0; tap < taps; tap++) {
          vec v = load(image + places[tap] + c, lanes) * scale + shift;
          none |= v != v;
          best = at_least(best, v);
        }
        best = choose(none, splat(NAN), best);
        if (o->added) {
          vec added = load(o->added + place + c, lanes);
          if (o->added_scale) added = added * load(o->added_scale + c, lanes) + load(o->added_shift + c, lanes);
          best += added;
        }
        store(out + place + c, best, lanes);
      });
    }
  }
}

/* ---- Training: what is done to a map beside its products ---- */

/* out = max(in * scale + shift + added, floor) for `count` pixels; `added` may be NULL. */
void affine(const float *in, int count, int channels, const float *scale, const float *shift, const float *added,
            float floor, float *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int p = 0; p < count; p++) {
    long at = (long)p * channels;
    EACH_VECTOR(0, channels, {
      vec v = load(in + at + c, lanes) * load(scale + c, lanes) + load(shift + c, lanes);
      if (added) v += load(added + at + c, lanes);
      store(out + at + c, at_least(splat(floor), v), lanes);
    });
  }
}

/* A GRADIENT as a map in memory. */
void gradient_map(const struct left *l, float *out, int threads) {
  int count = pixels(l), parts = over(count, 64);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int part = 0; part < parts; part++) {
    struct tile t = {out + (long)part * 64 * l->channels, l->channels, 0, 0};
    fill(l, part * 64, smaller(64, count - part * 64), &t, 0, l->channels);
  }
}

/* Sums over tasks, in their order. */
static void join(const float *parts, int tasks, long floats, float *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long from = 0; from < floats; from += 64) {
    double sums[64] = {0};
    int here = floats - from < 64 ? (int)(floats - from) : 64;
    for (int task = 0; task < tasks; task++)
      for (int i = 0; i < here; i++) sums[i] += parts[task * floats + from + i];
    for (int i = 0; i < here; i++) out[from + i] = (float)sums[i];
  }
}

enum { MOST = 128 }; /* tasks of a sum over pixels */

/* Behind a batch norm: the sums (2, channels) of the gradient g, and of g * (in - mean), over all pixels. With `masked`
 * g is first made zero where in * scale + shift is not above zero, and kept there. `parts`: MOST * 2 * channels. */
void norm_sums(const float *g, const float *in, int count, int channels, const float *mean, const float *scale,
               const float *shift, float *masked, float *parts, float *sums, int threads) {
  int share = over(count, MOST), tasks = over(count, share);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int task = 0; task < tasks; task++) {
    float *part = parts + (long)task * 2 * channels;
    memset(part, 0, sizeof(float) * 2 * (size_t)channels);
    for (int p = task * share; p < smaller(count, (task + 1) * share); p++)
      EACH_VECTOR(0, channels, {
        long at = (long)p * channels + c;
        vec v = load(g + at, lanes), u = load(in + at, lanes), zero = {0};
        if (masked) {
          v = choose(u * load(scale + c, lanes) + load(shift + c, lanes) > zero, v, zero);
          store(masked + at, v, lanes);
        }
        vec product = v * (u - load(mean + c, lanes));
        store(part + c, load(part + c, lanes) + v, lanes);
        store(part + channels + c, load(part + channels + c, lanes) + product, lanes);
      });
  }
  join(parts, tasks, 2L * channels, sums, threads);
}

/* The gradient of pool() for `in * scale + shift`, every window's to the first of its largest values, and as in
 * norm_sums() the sums of it. A task has a band of rows of windows, and of the map the rows from its first window's on to
 * the next band's; windows before the band that reach into it are found a second time.
 * `parts`: pool_bands * 2 * channels. */
enum { BAND = 8 };
int pool_bands(const struct pool *o) { return o->batch * over(o->out_height, BAND); }

void pool_backward(const struct pool *o, const float *g, const float *mean, float *out, float *parts, float *sums,
                   int threads) {
  int C = o->channels, bands = over(o->out_height, BAND), reach = over(2 * o->dilation, o->stride);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int task = 0; task < o->batch * bands; task++) {
    int b = task / bands, y0 = task % bands * BAND, y1 = smaller(o->out_height, y0 + BAND);
    int from = y0 ? larger(0, y0 * o->stride - o->top) : 0;
    int to = y1 < o->out_height ? smaller(o->height, y1 * o->stride - o->top) : o->height;
    const float *image = o->in + (long)b * o->height * o->width * C;
    float *into = out + (long)b * o->height * o->width * C, *part = parts + (long)task * 2 * C;
    long low = (long)from * o->width * C, high = (long)to * o->width * C;
    if (low < high) memset(into + low, 0, sizeof(float) * (size_t)(high - low));
    memset(part, 0, sizeof(float) * 2 * (size_t)C);
    for (int y = larger(0, y0 - reach); y < y1; y++)
      for (int x = 0; x < o->out_width; x++) {
        long places[9], place = (((long)b * o->out_height + y) * o->out_width + x) * C;
        int taps = window(o, y, x, places);
        EACH_VECTOR(0, C, {
          vec scale = load(o->scale + c, lanes), shift = load(o->shift + c, lanes), v = load(g + place + c, lanes);
          vec raw = load(image + places[0] + c, lanes), best = raw * scale + shift, zero = {0};
          mask winner = {0};
          for (int tap = 1; tap < taps; tap++) {
            vec in = load(image + places[tap] + c, lanes), value = in * scale + shift;
            mask wins = value > best;
            best = choose(wins, value, best);
            raw = choose(wins, in, raw);
            winner = (mask)choose(wins, (vec)((mask){0} + tap), (vec)winner);
          }
          for (int tap = 0; tap < taps; tap++) {
            float *at = into + places[tap] + c;
            if (places[tap] >= low && places[tap] < high)
              store(at, load(at, lanes) + choose(winner == tap, v, zero), lanes);
          }
          if (y >= y0) {
            store(part + c, load(part + c, lanes) + v, lanes);
            store(part + C + c, load(part + C + c, lanes) + v * (raw - load(mean + c, lanes)), lanes);
          }
        });
      }
  }
  join(parts, o->batch * bands, 2L * C, sums, threads);
}

/* ---- Training: gradients of a layer ---- */

/* Gradient of the depthwise convolution that `left` describes, from the gradient `g` of its output. */
struct depthwise_gradient {
  const struct left *left;
  const float *g;
  const float *mean;  /* of the batch norm before; NULL where there is none */
  const float *added; /* to the result, at every `added_stride`-th pixel, or NULL */
  int added_stride;
  float *out;   /* of in * scale + shift, zero where it does not exceed the floor, plus `added` */
  float *parts; /* MOST * 11 * channels */
  float *sums;  /* (11, channels): gradients of the nine taps, then as in norm_sums() */
};

enum { SPAN = 80 }; /* pixels of a row at a time */

/* A span of a row from pixel x0 on, for a vector of channels. Every column of the gradient is read once; it takes part in
 * the sums of three pixels and, with what these three read, in the taps. */
inline_always void depthwise_span(const struct depthwise_gradient *d, int row, int x0, int fresh, float *part, int c,
                                  int lanes) {
  const struct left *l = d->left;
  int C = l->channels, W = l->width, H = l->height, y = row % H, e = l->dilation, s = d->added_stride;
  int x1 = smaller(W, x0 + SPAN);
  const vec zero = {0}, floor = splat(l->floor);
  vec scale = l->scale ? load(l->scale + c, lanes) : splat(1), shift = l->scale ? load(l->shift + c, lanes) : zero;
  vec middle = d->mean ? load(d->mean + c, lanes) : zero, sum = zero, product = zero, taps[3][3], w[3][3];
  long line = (long)row * W * C + c;
  const float *in = l->in + line, *added = d->added, *from[3];
  float *out = d->out + line;
  for (int i = 0; i < 3; i++) {
    int at = y - (i - 1) * e, inside = at >= 0 && at < H;
    from[i] = d->g + line - (inside ? (long)(i - 1) * e * W * C : 0);
    for (int j = 0; j < 3; j++) {
      taps[i][j] = zero;
      w[i][j] = inside ? load(l->depthwise + (3 * i + j) * C + c, lanes) : zero;
    }
  }
  if (added && y % s == 0)
    added += ((long)(row / H * over(H, s) + y / s) * over(W, s)) * C + c;
  else
    added = NULL;
#define READ(x) at_least(floor, load(in + (long)(x) * C, lanes) * scale + shift)
  for (int start = x0; start < smaller(x0 + e, x1); start++) {
    vec before = zero, here = zero, after = READ(start), last = zero, now = zero;
    for (int x = start - e; x - e < x1; x += e) { /* `last` and `now` are the sums of pixels x - e and x */
      vec next = zero;
      if (x >= 0 && x < W) {
        if (c % PANEL == 0) __builtin_prefetch(in + (long)x * C + PANEL); /* here and below: the next vectors' line */
#pragma GCC unroll 3
        for (int i = 0; i < 3; i++) {
          const float *at = from[i] + (long)x * C;
          vec g = load(at, lanes);
          if (c % PANEL == 0) __builtin_prefetch(at + PANEL);
          last += w[i][0] * g;
          now += w[i][1] * g;
          next += w[i][2] * g;
          taps[i][0] += before * g;
          taps[i][1] += here * g;
          taps[i][2] += after * g;
        }
      }
      if (x - e >= x0) {
        vec u = load(in + (long)(x - e) * C, lanes);
        vec r = choose(u * scale + shift > floor, last, zero);
        sum += r;
        product += r * (u - middle);
        if (added && (x - e) % s == 0) r += load(added + (long)((x - e) / s) * C, lanes);
        store(out + (long)(x - e) * C, r, lanes);
        if (c % PANEL == 0) __builtin_prefetch(out + (long)(x - e) * C + PANEL, 1);
      }
      before = here, here = after, last = now, now = next;
      after = x + 2 * e < x1 ? READ(x + 2 * e) : zero;
    }
  }
#undef READ
  for (int i = 0; i < 3; i++) /* a row outside counts nothing */
    if (y - (i - 1) * e < 0 || y - (i - 1) * e >= H) taps[i][0] = taps[i][1] = taps[i][2] = zero;
  for (int k = 0; k < 11; k++) {
    vec v = k < 9 ? taps[k / 3][k % 3] : k == 9 ? sum : product;
    store(part + k * C + c, fresh ? v : load(part + k * C + c, lanes) + v, lanes);
  }
}

void depthwise_backward(const struct depthwise_gradient *d, int threads) {
  int C = d->left->channels, rows = d->left->batch * d->left->height;
  int share = larger(4, over(rows, MOST)), tasks = over(rows, share); /* a task's rows read two more of the gradient */
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int task = 0; task < tasks; task++)
    for (int row = task * share; row < smaller(rows, (task + 1) * share); row++)
      for (int x = 0; x < d->left->width; x += SPAN)
        EACH_VECTOR(0, C, {
          depthwise_span(d, row, x, row == task * share && !x, d->parts + task * 11L * C, c, lanes);
        });
  join(d->parts, tasks, 11L * C, d->sums, threads);
}

/* How the gradient of a product's right-hand side is cut: `rows` (a GRADIENT's channels) by `columns` (the left-hand
 * side's) in blocks, over segments of the pixels where blocks alone would be few. A block's columns of the left-hand
 * side, over a chunk of pixels, and a strip of its rows fit the second-level cache together; its sums need not. */
struct cut {
  int block_rows, block_columns, tall, wide, segments, chunks; /* chunks of CHUNK pixels a segment */
  long block, floats;                                          /* of a block's sums, of all partial sums */
};
enum { BLOCK = 768, STRIP = 192 };

static struct cut cut(int rows, int columns, int count) {
  struct cut k;
  k.block_rows = over(over(rows, over(rows, BLOCK)), ROWS) * ROWS;
  k.block_columns = over(over(columns, over(columns, BLOCK)), PANEL) * PANEL;
  k.tall = over(rows, k.block_rows), k.wide = over(columns, k.block_columns);
  int all = over(count, CHUNK);
  /* Enough for many threads, few enough for the partial sums not to be a map of their own. */
  int most = larger(8, (int)((1L << 22) / ((long)rows * columns)));
  k.segments = larger(1, smaller(smaller(over(32, k.tall * k.wide), most), all / 2));
  k.chunks = over(all, k.segments);
  k.segments = over(all, k.chunks);
  k.block = (long)k.block_rows * k.block_columns;
  k.floats = k.segments * k.tall * k.wide * k.block;
  return k;
}
long weight_gradient_floats(int rows, int columns, int count) { return cut(rows, columns, count).floats; }

/* out (rows, columns) = the transpose of the map that `gradient` gives, times `left`. `parts`: weight_gradient_floats,
 * each block's sums in panels of columns. Returns 0, or 1 when memory is short. */
int weight_gradient(const struct left *left, const struct left *gradient, float *parts, float *out, int threads) {
  int rows = gradient->channels, columns = depth(left), count = pixels(left), failed = 0;
  struct cut k = cut(rows, columns, count);
  long step = smaller(STRIP, k.block_rows) + WIDTH, panel = (long)k.block_rows * PANEL;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    size_t a_floats = (size_t)CHUNK * step, b_floats = (size_t)CHUNK * k.block_columns;
    float *a = room(a_floats), *b = room(b_floats);
    failed = !a || !b;
    if (!failed) memset(a, 0, sizeof(float) * a_floats), memset(b, 0, sizeof(float) * b_floats);
#pragma omp for schedule(dynamic)
    for (int task = 0; task < k.segments * k.tall * k.wide; task++) {
      if (failed) continue;
      int segment = task / (k.tall * k.wide), block = task % (k.tall * k.wide);
      int top = block / k.wide * k.block_rows, bottom = smaller(rows, top + k.block_rows);
      int column = block % k.wide * k.block_columns, wide = smaller(k.block_columns, columns - column);
      float *part = parts + task * k.block;
      struct tile tb = {b, PANEL, CHUNK * PANEL, column};
      for (int chunk = segment * k.chunks; chunk < (segment + 1) * k.chunks; chunk++) {
        int first = chunk * CHUNK, here = smaller(CHUNK, count - first);
        if (here <= 0) break;
        fill(left, first, here, &tb, column, column + wide);
        for (int row = top; row < bottom; row += STRIP) {
          int end = smaller(bottom, row + STRIP);
          struct tile ta = {a, step, 0, row};
          fill(gradient, first, here, &ta, row, end);
          for (int n = 0; n < wide; n += PANEL)
            for (int m = row; m < end; m += ROWS)
              multiply_columns(here, a + m - row, step, b + n * CHUNK, part + n / PANEL * panel + (m - top) * PANEL,
                               chunk > segment * k.chunks);
        }
      }
    }
    free(a);
    free(b);
  }
  if (failed) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int n = 0; n < columns; n += PANEL) /* down a panel: its parts lie together */
    for (int row = 0; row < rows; row++) {
      int block = row / k.block_rows * k.wide + n / k.block_columns;
      const float *part = parts + block * k.block + n % k.block_columns / PANEL * panel + row % k.block_rows * PANEL;
      EACH_VECTOR(n, smaller(columns, n + PANEL), {
        vec sum = {0};
        for (int segment = 0; segment < k.segments; segment++)
          sum += load(part + segment * k.tall * k.wide * k.block + c - n, lanes);
        store(out + (long)row * columns + c, sum, lanes);
      });
    }
  return 0;
}
