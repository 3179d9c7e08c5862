/* A crop of a JPEG, resized: only the rows and columns of the crop are turned into pixels.
 *
 * libjpeg-turbo decodes (jpeg_skip_scanlines, jpeg_crop_scanline, scaled DCTs); it is opened at run time from the wheel
 * of torchvision or Pillow, so nothing is linked and no header is needed. The resize is Pillow's: antialiased, two
 * passes, 8 bits between them, the same fixed-point weights, hence the same bytes. A flip reverses the order of the
 * horizontal weights and costs nothing.
 *
 * Any error or warning of libjpeg ends in "not decoded": the caller then asks Pillow, whose judgement counts.
 */
#include <dlfcn.h>
#include <math.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* ---- As much of libjpeg's interface as is the same in its versions 6b to 8 (libjpeg.so.62 to .so.8) ---- */

enum { RGBX = 7 };      /* JCS_EXT_RGBX */
enum { OLD = 62, NEW = 80 };

struct error_manager {
  void (*error_exit)(void *);
  void (*emit_message)(void *, int level);
  void (*output_message)(void *);
  void (*format_message)(void *, char *);
  void (*reset)(void *);
  int code;
  int parameters[20];
  int trace_level;
  long warnings;
  const char *const *table;
  int last;
  const char *const *more_table;
  int first_more, last_more;
};

struct decompress {
  struct error_manager *err;
  void *mem, *progress, *client_data;
  int is_decompressor, global_state;
  void *src;
  unsigned image_width, image_height;
  int num_components, jpeg_color_space, out_color_space;
  unsigned scale_num, scale_denom;
  double output_gamma;
  int buffered_image, raw_data_out, dct_method, do_fancy_upsampling, do_block_smoothing, quantize_colors;
  int dither_mode, two_pass_quantize, desired_number_of_colors;
  int enable_1pass_quant, enable_external_quant, enable_2pass_quant;
  unsigned output_width, output_height;
  int out_color_components, output_components, rec_outbuf_height, actual_number_of_colors;
  void *colormap;
  unsigned output_scanline;
  char private_part[1024];
};

static struct {
  int version;
  size_t size;
  struct error_manager *(*std_error)(struct error_manager *);
  void (*create)(struct decompress *, int version, size_t size);
  void (*mem_src)(struct decompress *, const unsigned char *, unsigned long);
  int (*read_header)(struct decompress *, int);
  int (*start)(struct decompress *);
  void (*crop)(struct decompress *, unsigned *left, unsigned *width);
  unsigned (*skip)(struct decompress *, unsigned rows);
  unsigned (*read)(struct decompress *, uint8_t **rows, unsigned count);
  void (*destroy)(struct decompress *);
} jpeg;

struct guard {
  struct error_manager manager; /* first: libjpeg sees only this */
  jmp_buf escape;
};

static void give_up(void *cinfo) { longjmp(((struct guard *)((struct decompress *)cinfo)->err)->escape, 1); }
static void on_message(void *cinfo, int level) {
  if (level < 0) give_up(cinfo); /* a warning: the data are damaged */
}

static void guard(struct decompress *cinfo, struct guard *g) {
  cinfo->err = jpeg.std_error(&g->manager);
  g->manager.error_exit = give_up;
  g->manager.emit_message = on_message;
}

/* Ask for a decompressor; if libjpeg refuses, the number that it expected instead (version or size). */
static int expected(int version, size_t size) {
  struct decompress cinfo;
  struct guard g;
  memset(&cinfo, 0, sizeof cinfo);
  guard(&cinfo, &g);
  if (setjmp(g.escape)) return g.manager.parameters[0];
  jpeg.create(&cinfo, version, size);
  jpeg.destroy(&cinfo);
  return 0;
}

/* Open libjpeg-turbo. 0 when it can be used. */
int crop_open(const char *path) {
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return 1;
  *(void **)&jpeg.std_error = dlsym(library, "jpeg_std_error");
  *(void **)&jpeg.create = dlsym(library, "jpeg_CreateDecompress");
  *(void **)&jpeg.mem_src = dlsym(library, "jpeg_mem_src");
  *(void **)&jpeg.read_header = dlsym(library, "jpeg_read_header");
  *(void **)&jpeg.start = dlsym(library, "jpeg_start_decompress");
  *(void **)&jpeg.crop = dlsym(library, "jpeg_crop_scanline");
  *(void **)&jpeg.skip = dlsym(library, "jpeg_skip_scanlines");
  *(void **)&jpeg.read = dlsym(library, "jpeg_read_scanlines");
  *(void **)&jpeg.destroy = dlsym(library, "jpeg_destroy_decompress");
  if (!jpeg.std_error || !jpeg.create || !jpeg.mem_src || !jpeg.read_header || !jpeg.start || !jpeg.crop || !jpeg.skip ||
      !jpeg.read || !jpeg.destroy)
    return 2;
  jpeg.version = expected(0, 0);
  if (jpeg.version < OLD || jpeg.version > NEW) return 3;
  int size = expected(jpeg.version, 0);
  if (size < (int)offsetof(struct decompress, private_part) || size > (int)sizeof(struct decompress)) return 4;
  jpeg.size = (size_t)size;
  return expected(jpeg.version, jpeg.size) == 0 ? 0 : 5;
}

/* ---- Pillow's resize ---- */

enum { BITS = 22 };

struct weights {
  int taps;    /* the same for each output pixel; unused ones weigh 0 */
  int *first;  /* first input pixel, from the start of the decoded range */
  int32_t *at; /* taps for each output pixel */
};

static double triangle(double x) { return fabs(x) < 1 ? 1 - fabs(x) : 0; }
static double cubic(double x) { /* Catmull and Rom, a = -0.5 */
  x = fabs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

/* How far a filter reaches to each side of its centre. */
static double reach(double length, int size, int bicubic) { return (bicubic ? 2 : 1) * fmax(length / size, 1); }

/* Weights for [start, start + length) onto `size` pixels; input pixels exist in [low, high). */
static int make_weights(struct weights *w, double start, double length, int low, int high, int size, int bicubic) {
  double scale = length / size, stretch = fmax(scale, 1), support = reach(length, size, bicubic);
  int room = (int)ceil(support) * 2 + 1;
  w->first = malloc((size_t)size * (sizeof(int) + (size_t)room * sizeof(int32_t)));
  double *real = malloc((size_t)room * sizeof(double));
  if (!w->first || !real) {
    free(real);
    return 1;
  }
  w->at = (int32_t *)(w->first + size);
  memset(w->at, 0, (size_t)size * (size_t)room * sizeof(int32_t));
  w->taps = 1;
  for (int i = 0; i < size; i++) {
    double centre = start + (i + 0.5) * scale, sum = 0;
    int from = (int)fmax(centre - support + 0.5, low), to = (int)fmin(centre + support + 0.5, high);
    for (int x = from; x < to; x++) {
      double offset = (x - centre + 0.5) / stretch;
      sum += real[x - from] = bicubic ? cubic(offset) : triangle(offset);
    }
    if (from >= to) { /* less than a pixel is there: the nearest one alone */
      from = from < high ? from : high - 1, to = from + 1;
      real[0] = sum = 1;
    }
    for (int k = 0; k < to - from; k++) w->at[(size_t)i * room + k] = (int32_t)lrint(real[k] / sum * (1 << BITS));
    w->first[i] = from - low;
    if (to - from > w->taps) w->taps = to - from;
  }
  for (int i = 1; i < size; i++) /* close the gaps */
    memmove(w->at + (size_t)i * w->taps, w->at + (size_t)i * room, (size_t)w->taps * sizeof(int32_t));
  free(real);
  return 0;
}

typedef int32_t four __attribute__((vector_size(16)));
typedef uint8_t four_bytes __attribute__((vector_size(4)));
typedef int32_t eight __attribute__((vector_size(32)));
typedef uint8_t eight_bytes __attribute__((vector_size(8)));

/* Bytes to whole numbers and, rounded and clipped, back. GCC makes slow code of the general form on x86. */
#ifdef __AVX2__
static inline four load_four(const uint8_t *in) { return (four)_mm_cvtepu8_epi32(_mm_loadu_si32(in)); }
static inline eight load_eight(const uint8_t *in) { return (eight)_mm256_cvtepu8_epi32(_mm_loadu_si64(in)); }
static inline void store_four(uint8_t *out, four sum) {
  __m128i words = _mm_packus_epi32((__m128i)(sum >> BITS), _mm_setzero_si128());
  _mm_storeu_si32(out, _mm_packus_epi16(words, words));
}
static inline void store_eight(uint8_t *out, eight sum) {
  __m256i shifted = (__m256i)(sum >> BITS);
  __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(shifted), _mm256_extracti128_si256(shifted, 1));
  _mm_storeu_si64(out, _mm_packus_epi16(words, words));
}
#else
#define CLIP(sum) (sum >>= BITS, sum = (sum & ~(sum > 255)) | ((sum > 255) & 255), sum &= ~(sum < 0))
static inline four load_four(const uint8_t *in) {
  four_bytes bytes;
  memcpy(&bytes, in, sizeof bytes);
  return __builtin_convertvector(bytes, four);
}
static inline eight load_eight(const uint8_t *in) {
  eight_bytes bytes;
  memcpy(&bytes, in, sizeof bytes);
  return __builtin_convertvector(bytes, eight);
}
static inline void store_four(uint8_t *out, four sum) {
  CLIP(sum);
  four_bytes bytes = __builtin_convertvector(sum, four_bytes);
  memcpy(out, &bytes, sizeof bytes);
}
static inline void store_eight(uint8_t *out, eight sum) {
  CLIP(sum);
  eight_bytes bytes = __builtin_convertvector(sum, eight_bytes);
  memcpy(out, &bytes, sizeof bytes);
}
#endif

/* One output pixel before rounding. */
static inline __attribute__((always_inline)) four weigh(const uint8_t *in, const struct weights *w, int o, int taps) {
  const uint8_t *pixel = in + 4 * (size_t)w->first[o];
  const int32_t *weight = w->at + (size_t)o * (size_t)taps;
  four sum = (four){0} + (1 << (BITS - 1));
  for (int k = 0; k < taps; k++) sum += load_four(pixel + 4 * k) * weight[k];
  return sum;
}

/* One row: RGBX pixels in, `size` RGB pixels out; writes one byte more than 3 * size. The compiler makes a copy of this
 * for each constant `taps`. */
static inline __attribute__((always_inline)) void resize_row_by(const uint8_t *in, uint8_t *out, const struct weights *w,
                                                                int size, int flip, int taps) {
  int step = flip ? -1 : 1, o = flip ? size - 1 : 0, i = 0;
#ifdef __AVX2__
  const __m128i rgb = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 7, 11, 15);
  for (; i + 5 < size; i += 4, out += 12) { /* the 16 bytes stored are written over but for 12 */
    __m128i sum[4];
    for (int j = 0; j < 4; j++, o += step) sum[j] = (__m128i)(weigh(in, w, o, taps) >> BITS);
    __m128i bytes = _mm_packus_epi16(_mm_packus_epi32(sum[0], sum[1]), _mm_packus_epi32(sum[2], sum[3]));
    _mm_storeu_si128((__m128i *)out, _mm_shuffle_epi8(bytes, rgb));
  }
#endif
  for (; i < size; i++, o += step, out += 3) store_four(out, weigh(in, w, o, taps));
}

static void resize_row(const uint8_t *in, uint8_t *out, const struct weights *w, int size, int flip) {
  switch (w->taps) {
    case 2: resize_row_by(in, out, w, size, flip, 2); break;
    case 3: resize_row_by(in, out, w, size, flip, 3); break;
    case 4: resize_row_by(in, out, w, size, flip, 4); break;
    case 5: resize_row_by(in, out, w, size, flip, 5); break;
    default: resize_row_by(in, out, w, size, flip, w->taps);
  }
}

/* One row out of `taps` rows that are `stride` bytes apart; reads and writes up to 15 bytes past `stride`. */
static inline __attribute__((always_inline)) void resize_column_by(const uint8_t *in, size_t stride, uint8_t *out,
                                                                   const int32_t *weight, int taps) {
  for (size_t x = 0; x < stride; x += 16) {
#ifdef __AVX512F__
    __m512i sum = _mm512_set1_epi32(1 << (BITS - 1));
    for (int k = 0; k < taps; k++) {
      __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(in + (size_t)k * stride + x)));
      sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(bytes, _mm512_set1_epi32(weight[k])));
    }
    sum = _mm512_max_epi32(_mm512_srai_epi32(sum, BITS), _mm512_setzero_si512());
    _mm_storeu_si128((__m128i *)(out + x), _mm512_cvtusepi32_epi8(sum));
#else
    eight low = (eight){0} + (1 << (BITS - 1)), high = low;
    for (int k = 0; k < taps; k++) {
      low += load_eight(in + (size_t)k * stride + x) * weight[k];
      high += load_eight(in + (size_t)k * stride + x + 8) * weight[k];
    }
    store_eight(out + x, low);
    store_eight(out + x + 8, high);
#endif
  }
}

static void resize_column(const uint8_t *in, size_t stride, uint8_t *out, const int32_t *weight, int taps) {
  switch (taps) {
    case 2: resize_column_by(in, stride, out, weight, 2); break;
    case 3: resize_column_by(in, stride, out, weight, 3); break;
    case 4: resize_column_by(in, stride, out, weight, 4); break;
    default: resize_column_by(in, stride, out, weight, taps);
  }
}

/* ---- The crop ---- */

struct buffers {
  struct weights x, y;
  uint8_t *line, *rows;
};

/* Not inlined: longjmp would leave the caller's copies of what it changes undefined. */
static __attribute__((noinline)) int decode(struct decompress *cinfo, struct buffers *b, const uint8_t *data,
                                            size_t length, const double *box, int context, int scaled, int size,
                                            int bicubic, int flip, uint8_t *out) {
  jpeg.mem_src(cinfo, data, (unsigned long)length);
  jpeg.read_header(cinfo, 1);
  if (cinfo->num_components != 1 && cinfo->num_components != 3) return 1;
  double top = box[0], left = box[1], height = box[2], width = box[3], slack = 1e-6;
  if (top < 0 || left < 0 || height < slack || width < slack || size < 1) return 1;
  if (top + height > cinfo->image_height + slack || left + width > cinfo->image_width + slack) return 1;

  /* A smaller DCT, as long as what it gives is not smaller than the output: 1/2, 1/4 or 1/8 of the side. */
  cinfo->scale_num = cinfo->scale_denom = 8;
  while (scaled && cinfo->scale_num > 1 && fmin(height, width) * (cinfo->scale_num / 2) >= 8.0 * size) cinfo->scale_num /= 2;
  double scale = cinfo->scale_num / 8.0;
  top *= scale, left *= scale, height *= scale, width *= scale;
  cinfo->out_color_space = RGBX;
  jpeg.start(cinfo);

  /* The pixels that the filters may see: the box alone, or with what is around it. */
  double around_y = context ? reach(height, size, bicubic) : 0, around_x = context ? reach(width, size, bicubic) : 0;
  int y0 = (int)fmax(floor(top - around_y), 0), y1 = (int)fmin(ceil(top + height + around_y), cinfo->output_height);
  int x0 = (int)fmax(floor(left - around_x), 0), x1 = (int)fmin(ceil(left + width + around_x), cinfo->output_width);
  if (y0 >= y1 || x0 >= x1) return 1;

  /* Two pixels more at each side: the upsampling of colour looks at neighbours. */
  unsigned from = x0 > 2 ? (unsigned)x0 - 2 : 0, to = (unsigned)x1 + 2;
  if (to > cinfo->output_width) to = cinfo->output_width;
  unsigned wide = to - from;
  if (wide < cinfo->output_width) jpeg.crop(cinfo, &from, &wide);
  if (make_weights(&b->x, left, width, x0, x1, size, bicubic)) return 1;
  if (make_weights(&b->y, top, height, y0, y1, size, bicubic)) return 1;
  size_t stride = 3 * (size_t)size;
  b->line = malloc(4 * ((size_t)cinfo->output_width + (size_t)b->x.taps));
  b->rows = malloc((size_t)(y1 - y0 + b->y.taps) * stride + 16);
  if (!b->line || !b->rows) return 1;
  if (y0 && jpeg.skip(cinfo, (unsigned)y0) != (unsigned)y0) return 1;
  for (int y = y0; y < y1; y++) {
    if (jpeg.read(cinfo, &b->line, 1) != 1) return 1;
    resize_row(b->line + 4 * ((unsigned)x0 - from), b->rows + (size_t)(y - y0) * stride, &b->x, size, flip);
  }
  for (int i = 0; i < size; i++)
    resize_column(b->rows + (size_t)b->y.first[i] * stride, stride, out + (size_t)i * stride,
                  b->y.at + (size_t)i * b->y.taps, b->y.taps);
  return 0;
}

/* Decode `box` (top, left, height, width in pixels of the full image) of a JPEG into `out`: size × size × 3 bytes and
 * room for 16 more. `context`: the filters also see the pixels around the box; `scaled`: a smaller DCT is allowed.
 * Returns 0, or 1 when this JPEG is not for this function. */
int crop_jpeg(const uint8_t *data, size_t length, const double *box, int context, int scaled, int size, int bicubic,
              int flip, uint8_t *out) {
  struct decompress cinfo;
  struct guard g;
  struct buffers b;
  volatile int failed = 1;
  memset(&cinfo, 0, sizeof cinfo);
  memset(&b, 0, sizeof b);
  guard(&cinfo, &g);
  if (!setjmp(g.escape)) {
    jpeg.create(&cinfo, jpeg.version, jpeg.size);
    failed = decode(&cinfo, &b, data, length, box, context, scaled, size, bicubic, flip, out);
  }
  jpeg.destroy(&cinfo);
  free(b.x.first);
  free(b.y.first);
  free(b.line);
  free(b.rows);
  return failed;
}
