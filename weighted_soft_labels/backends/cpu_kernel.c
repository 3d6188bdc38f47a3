/* C kernel of the CPU backend: loss and gradient of every row, in one pass over the logits.
 *
 *     run                      checks labels, plans tiles, hands them to torch's threads
 *      '- work_on_tiles        one thread's share
 *          |- load_tile        logits (B, C, R) of any strides -> float32 scratch in the cache
 *          |- work_on_rows     at most LANES rows of the tile
 *          |   |- statistics   maximum and sums of each row; exp(z / T) replaces the logits
 *          |   |- combine      sums -> losses and the scales of the gradient
 *          |   '- gradient     gradient replaces the student's exp(z / T)
 *          '- store_tile       gradient -> its tensor
 *
 * The closed form stands in eager.py. As there, the sums leave out one maximum, whose e is 1: the
 * sum of the others then is Z - 1 without cancellation. Triton's kernels leave out the label.
 *
 * Layouts: with "rows", the lanes of a vector are classes of one row. With "pixels", rows are
 * neighbours in memory, and lanes are rows. Loops over lanes are loops over short arrays, which the
 * compiler turns into the vectors of each instruction set.
 *
 * If inf or NaN matters to a row, its loss is NaN, and Python recomputes the row. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EPS 1e-7f /* from the official code: a finite weight where the teacher's CE is 0 */
#define LANES 16  /* at most; the parameter `lanes` is a constant wherever it is used */
#define BLOCK 64  /* a lane adds up so many terms in float before their sum joins a double */
#define GRAIN 3072            /* logits that are worth another thread */
#define ROWS_TILE_LOGITS 2048 /* student and teacher together fit in the first-level cache */
#define PIXELS_TILE_LOGITS 16384
#define PIXELS_TILE_ROWS 128

#ifdef __GNUC__
#define INLINE static inline __attribute__((always_inline)) /* uses the caller's instruction set */
#define EACH_LANE _Pragma("omp simd") for (int l = 0; l < lanes; l++)
#define EACH_LANE_INTO_SUM _Pragma("omp simd reduction(+:sum)") for (int l = 0; l < lanes; l++)
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define INLINE static inline
#define EACH_LANE for (int l = 0; l < lanes; l++)
#define EACH_LANE_INTO_SUM EACH_LANE
#define PREFETCH(address) (void)(address)
#endif

enum { FLOAT32, BFLOAT16, FLOAT16 };
static const int SIZE[] = {4, 2, 2};
enum { STUDENT, TEACHER, SETS };
enum { ANY_T, T_IS_1, T_IS_2 }; /* at T = 1 and 2, exp(z) is a power of exp(z / T) */
enum { OTHERS, SOFT_OTHERS, TEACHER_OTHERS, TEACHER_SOFT_OTHERS, DOT, Z_SUM, SUMS };
enum { HARD_SCALE, SOFT_SCALE, TEACHER_RATIO, UNIFORM, AT_LABEL, SCALES };

typedef struct {
    Py_ssize_t address, batch, class_, row; /* address 0: no tensor; strides in elements */
    int dtype;
} Logits;

typedef struct {
    Logits student, teacher, gradient;
    Py_ssize_t target, out, loss; /* addresses: int64 labels; losses or terms of rows; loss or 0 */
    Py_ssize_t batches, classes, rows, tile_rows, tiles_per_batch;
    long long ignore_index;
    float temperature, soft_weight, hard_weight, smoothing; /* soft_weight: alpha * T */
    float weight_scale;
    float row_share; /* 1, or 1 / count for the mean */
    int terms, pixels;
    volatile int out_of_memory;
} Job;

typedef struct { /* a tensor from a tile's first row on; strides in bytes */
    char *address;
    int64_t row, class_;
} View;

typedef struct {
    float *x[SETS]; /* logits, then exp(z / T) */
    float *e;       /* the student's exp(z), if T is neither 1 nor 2 */
    /*         steps (vectors of a row)  lines    row_pitch  class_pitch  step_pitch  line_pitch
     * rows    padded C / lanes          rows     padded C   1            lanes       padded C
     * pixels  C                         classes  1          tile_rows    tile_rows   tile_rows */
    int64_t steps, lines, row_pitch, class_pitch, step_pitch, line_pitch; /* pitches in floats */
    int64_t length; /* of a line, without padding */
    int64_t index, first, rows; /* of the tile, of its first row; number of its rows */
    View prefetch[3]; /* next tile's student and teacher, this tile's gradient */
    int pixels;
} Tile;

typedef struct { /* the statistics of each lane */
    float peak[SETS][LANES];
    int32_t below[SETS][LANES]; /* classes below the maximum */
    double sum[SUMS][LANES];
} Lanes;

typedef struct { /* one entry per row */
    int32_t label[LANES]; /* -1: ignored */
    int32_t top[LANES];   /* the student's top class, set if it has more than half of the mass */
    float label_logit[SETS][LANES], peak[SETS][LANES], sum[SUMS][LANES], scale[SCALES][LANES];
} Rows;

typedef union { float number; int32_t bits; } Float;

INLINE int32_t bits(float number) { return ((Float){.number = number}).bits; }
INLINE float from_bits(int32_t bits) { return ((Float){.bits = bits}).number; }

/* Selection by masks: compilers make no vectors of loops with branches. */
INLINE int32_t choose(int condition, int32_t yes, int32_t no)
{
    return no ^ ((yes ^ no) & -condition);
}

INLINE float choose_float(int condition, float yes, float no)
{
    return from_bits(choose(condition, bits(yes), bits(no)));
}

INLINE float or_zero(int condition, float v) { return from_bits(bits(v) & -condition); }

INLINE float from_float16(uint16_t half)
{
    const int32_t sign = (int32_t)((half & 0x8000u) << 16);
    const int32_t special = -((half & 0x7c00) == 0x7c00) & 0x7f800000; /* inf and NaN */
    return from_bits(bits(from_bits((half & 0x7fff) << 13) * 0x1p112f) | special | sign);
}

/* Both conversions round to nearest, ties to even. Any NaN stays NaN. */
INLINE uint16_t to_bfloat16(float number)
{
    const uint32_t i = (uint32_t)bits(number);
    const int32_t rounded = (int32_t)(i + 0x7fff + ((i >> 16) & 1)); /* turns some NaN into 0 */
    return (uint16_t)((uint32_t)choose(number != number, 0x7fc00000, rounded) >> 16);
}

INLINE uint16_t to_float16(float number)
{
    const int32_t i = bits(number);
    const int32_t size = i & 0x7fffffff;
    const int32_t subnormal = bits(from_bits(size) + 0.5f) - 0x3f000000;
    const int32_t normal = (size - 0x37fff001 + ((size >> 13) & 1)) >> 13;
    const int32_t finite = choose(size < 0x38800000, subnormal, normal);
    const int32_t special = size > 0x7f800000 ? 0x7e00 : 0x7c00; /* NaN or inf */
    return (uint16_t)(((i >> 16) & 0x8000) | choose(size >= 0x47800000, special, finite));
}

INLINE float load(const char *from, const int dtype)
{
    float number;
    uint16_t half;
    memcpy(dtype == FLOAT32 ? (void *)&number : &half, from, SIZE[dtype]);
    if (dtype == FLOAT32)
        return number;
    return dtype == BFLOAT16 ? from_bits((int32_t)((uint32_t)half << 16)) : from_float16(half);
}

INLINE void store(char *to, float number, const int dtype)
{
    const uint16_t half = dtype == BFLOAT16 ? to_bfloat16(number) : to_float16(number);
    memcpy(to, dtype == FLOAT32 ? (const void *)&number : &half, SIZE[dtype]);
}

/* exp(x) - minus for x <= 0, as 2^n * (1 + r + r^2 * P(r)), to about 1 ulp. Results below the
 * normal numbers are 0. */
INLINE float exp_minus(float x, const float minus)
{
    const float shifted = x * 1.44269504f + 12583039.0f; /* + 1.5 * 2^23 + 127: low bits are n */
    const float n = shifted - 12583039.0f;
    const float power = from_bits((int32_t)((uint32_t)bits(shifted) << 23));
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const float square = r * r;
    const float high = (r * 8.36941972e-3f + 4.16684560e-2f) + square * 1.38131401e-3f;
    const float p = (high * square + (r * 1.66665152e-1f + 0.49999994f)) * square + r;
    return or_zero(!(x < -87.0f), p * power + (power - minus)); /* negated, so that NaN stays */
}

/* log(1 + x) for x >= 0, as log(u) + (x - (u - 1)) / u with u = 1 + x rounded. The polynomial is
 * from musl's logf. */
INLINE float log1p_(float x)
{
    const float u = x + 1.0f;
    const int32_t i = bits(u) - 0x3f3504f3; /* sqrt(1/2) */
    const float n = (float)(i >> 23), f = from_bits((i & 0x7fffff) + 0x3f3504f3) - 1.0f;
    const float s = f / (f + 2.0f), z = s * s, w = z * z;
    const float half_square = f * f * 0.5f;
    const float polynomial =
        z * (w * 0.28498787f + 0.66666663f) + w * (w * 0.24279079f + 0.40000972f);
    const float low = n * 9.0580006e-06f + (x - (u - 1.0f)) / u;
    return s * (half_square + polynomial) + low - half_square + f + n * 0.69313812f;
}

typedef struct { /* one class of one row */
    float soft, e;             /* exp(z / T), exp(z) */
    float other_soft, other_e; /* the same, but 0 at a maximum */
} Element;

INLINE Element element(float z, float temperature, const int kind)
{
    const float z_soft = kind == T_IS_1 ? z : kind == T_IS_2 ? z * 0.5f : z * (1 / temperature);
    const float soft = exp_minus(z_soft, 0);
    const float e = kind == T_IS_1 ? soft : kind == T_IS_2 ? soft * soft : exp_minus(z, 0);
    const float other_soft = or_zero(z < 0, soft);
    const float other_e = kind == T_IS_2 ? other_soft * other_soft : or_zero(z < 0, e);
    const Element result = {soft, e, other_soft, other_e};
    return result;
}

INLINE void find_peaks(const Job *job, const Tile *tile, int64_t offset, Lanes *at, const int lanes)
{
    for (int i = 0; i < SETS; i++)
        EACH_LANE at->peak[i][l] = tile->x[i][offset + l];
    for (int64_t k = 1; k < tile->steps; k++)
        for (int i = 0; i < SETS; i++)
            EACH_LANE {
                const float x = tile->x[i][offset + k * tile->step_pitch + l];
                at->peak[i][l] = x > at->peak[i][l] ? x : at->peak[i][l];
            }
    for (int i = 0; i < SETS && !tile->pixels; i++) {
        float peak = at->peak[i][0];
        for (int l = 1; l < lanes; l++)
            peak = at->peak[i][l] > peak ? at->peak[i][l] : peak;
        EACH_LANE at->peak[i][l] = peak;
        for (int64_t c = job->classes; c < tile->row_pitch; c++)
            tile->x[i][offset + c] = peak; /* padding: z is 0, so that no sum changes */
    }
}

INLINE void add_up(const Job *job, const Tile *tile, int64_t row, Lanes *at, const int kind,
                   const int lanes)
{
    const int64_t offset = row * tile->row_pitch;
    float *__restrict student = tile->x[STUDENT] + offset;
    float *__restrict teacher = tile->x[TEACHER] + offset;
    float *__restrict e = tile->e + offset;
    const char *prefetch[3];
    for (int i = 0; i < 3; i++)
        prefetch[i] = tile->prefetch[i].address + row * tile->prefetch[i].row;
    for (int64_t k = 0; k < tile->steps;) {
        const int64_t end = tile->steps - k < BLOCK ? tile->steps : k + BLOCK;
        float sum[SUMS][LANES];
        for (int i = 0; i < SUMS; i++)
            EACH_LANE sum[i][l] = 0;
        for (; k < end; k++) {
            for (int i = 0; i < 3; i++) {
                PREFETCH(prefetch[i]);
                prefetch[i] += tile->prefetch[i].class_ * (tile->pixels ? 1 : lanes);
            }
            EACH_LANE {
                const int64_t here = k * tile->step_pitch + l;
                const float z = student[here] - at->peak[STUDENT][l];
                const float teacher_z = teacher[here] - at->peak[TEACHER][l];
                const Element s = element(z, job->temperature, kind);
                const Element t = element(teacher_z, job->temperature, kind);
                student[here] = s.soft;
                teacher[here] = t.soft;
                if (kind == ANY_T)
                    e[here] = s.e;
                sum[OTHERS][l] += s.other_e;
                sum[SOFT_OTHERS][l] += s.other_soft;
                sum[TEACHER_OTHERS][l] += t.other_e;
                sum[TEACHER_SOFT_OTHERS][l] += t.other_soft;
                sum[DOT][l] += t.soft * z;
                sum[Z_SUM][l] += z;
                at->below[STUDENT][l] += z < 0;
                at->below[TEACHER][l] += teacher_z < 0;
            }
        }
        for (int i = 0; i < SUMS; i++)
            EACH_LANE at->sum[i][l] += sum[i][l];
    }
}

/* Fills entry `j` of `rows` from row `row` of the tile; with pixels, all entries. */
INLINE void statistics(const Job *job, const Tile *tile, int64_t row, int j, Rows *rows,
                       const int kind, const int lanes)
{
    Lanes at = {0};
    find_peaks(job, tile, row * tile->row_pitch, &at, lanes);
    add_up(job, tile, row, &at, kind, lanes);
    for (int i = 0; i < SUMS && !tile->pixels; i++) {
        double sum = 0;
        EACH_LANE_INTO_SUM sum += at.sum[i][l];
        at.sum[i][0] = sum;
    }
    for (int i = 0; i < SETS && !tile->pixels; i++) {
        int32_t sum = 0;
        EACH_LANE_INTO_SUM sum += at.below[i][l];
        at.below[i][0] = sum;
    }
    for (int l = 0; l < (tile->pixels ? lanes : 1); l++) {
        for (int i = OTHERS; i <= TEACHER_SOFT_OTHERS; i++) { /* every further maximum has e = 1 */
            const int set = i / TEACHER_OTHERS; /* STUDENT or TEACHER */
            at.sum[i][l] += (double)(job->classes - at.below[set][l] - 1);
        }
        for (int i = 0; i < SETS; i++)
            rows->peak[i][j + l] = at.peak[i][l];
        for (int i = 0; i < SUMS; i++)
            rows->sum[i][j + l] = (float)at.sum[i][l];
    }
}

/* The losses of all rows, or their four terms, into `results`; and the scales of the gradient. */
INLINE void combine(const Job *job, Rows *rows, float results[4][LANES], const int lanes)
{
    const float classes = (float)job->classes;
    const float temperature = job->temperature, smoothing = job->smoothing;
    const float hard_weight = job->hard_weight, soft_weight = job->soft_weight;
    const float row_share = job->row_share, weight_scale = job->weight_scale;
    const int terms = job->terms;
    EACH_LANE {
        const float others = rows->sum[OTHERS][l];
        const float soft_z = 1 + rows->sum[SOFT_OTHERS][l];
        const float teacher_soft_z = 1 + rows->sum[TEACHER_SOFT_OTHERS][l];
        const float dot = rows->sum[DOT][l];
        const float label_z = rows->label_logit[STUDENT][l] - rows->peak[STUDENT][l];
        const float teacher_label_z = rows->label_logit[TEACHER][l] - rows->peak[TEACHER][l];
        const float log_z = log1p_(others);
        const float student_ce = log_z - label_z;
        const float teacher_ce = log1p_(rows->sum[TEACHER_OTHERS][l]) - teacher_label_z;
        const float ratio = -student_ce / (teacher_ce + EPS);
        const float clamped = choose_float(ratio < -87.0f, -87.0f, ratio);
        const float weight = 0.0f - exp_minus(clamped, 1); /* exp_minus is 0 below -87, not -1 */
        const float soft = log1p_(rows->sum[SOFT_OTHERS][l]) - dot / (temperature * teacher_soft_z);
        const float uniform = log_z - rows->sum[Z_SUM][l] / classes;
        const float hard = (1 - smoothing) * student_ce + smoothing * uniform;
        const float scaled = weight * weight_scale;
        const float loss = hard_weight * hard + soft_weight * temperature * scaled * soft;
        const float mark = (dot + label_z + teacher_label_z) * 0.0f; /* NaN if not finite, else 0 */
        const int counted = rows->label[l] >= 0;
        results[0][l] = or_zero(counted, choose_float(terms, student_ce, loss) + mark);
        results[1][l] = or_zero(counted, teacher_ce);
        results[2][l] = or_zero(counted, weight);
        results[3][l] = or_zero(counted, soft);
        rows->scale[HARD_SCALE][l] = row_share * hard_weight / (1 + others);
        rows->scale[SOFT_SCALE][l] = row_share * soft_weight * scaled / soft_z;
        rows->scale[TEACHER_RATIO][l] = soft_z / teacher_soft_z;
        rows->scale[UNIFORM][l] = row_share * hard_weight * (smoothing / classes);
        rows->scale[AT_LABEL][l] = row_share * hard_weight * (1 - smoothing);
    }
}

/* Gradient of row `j`, or with pixels of all rows, without the corrections of
 * `gradient_at_label_and_top`. Also finds the top class, whose exp(z / T) is 1. */
INLINE void gradient(const Job *job, const Tile *tile, int64_t offset, int j, Rows *rows,
                     const int kind, const int lanes)
{
    float *__restrict student = tile->x[STUDENT] + offset;
    const float *__restrict teacher = tile->x[TEACHER] + offset;
    const float *__restrict e_in = tile->e + offset;
    float scale[SCALES][LANES];
    int32_t top[LANES];
    for (int64_t c = job->classes; c < tile->row_pitch; c++)
        student[c] = 0; /* padding is never the top class */
    EACH_LANE top[l] = -1;
    for (int i = 0; i < SCALES; i++)
        EACH_LANE scale[i][l] = rows->scale[i][tile->pixels ? l : j];
    for (int64_t k = 0; k < tile->steps; k++)
        EACH_LANE {
            const int64_t here = k * tile->step_pitch + l;
            const float soft = student[here];
            const float e = kind == T_IS_1 ? soft : kind == T_IS_2 ? soft * soft : e_in[here];
            const float hard = scale[HARD_SCALE][l] * e - scale[UNIFORM][l];
            const float difference = soft - scale[TEACHER_RATIO][l] * teacher[here];
            student[here] = hard + scale[SOFT_SCALE][l] * difference;
            top[l] = choose(soft == 1, (int32_t)k, top[l]);
        }
    if (tile->pixels)
        EACH_LANE rows->top[l] = top[l];
    for (int l = 0; l < lanes && !tile->pixels && rows->sum[SOFT_OTHERS][j] < 1; l++)
        rows->top[j] = top[l] < 0 ? rows->top[j] : top[l] * lanes + l; /* a branch is slower */
}

/* Corrects the gradient of row `j`: subtracts q at the label, and replaces the gradient at the top
 * class. If others < 1 there, p - 1 is -others / (1 + others), because 1 - p would cancel. `top` is
 * -1 if no class has more than half of the mass and the label is not a maximum. */
INLINE void gradient_at_label_and_top(const Job *job, const Tile *tile, int64_t offset, int j,
                                      const Rows *rows)
{
    float *student = tile->x[STUDENT] + offset;
    const float *teacher = tile->x[TEACHER] + offset;
    const float others = rows->sum[OTHERS][j], soft_others = rows->sum[SOFT_OTHERS][j];
    const float hard_scale = rows->scale[HARD_SCALE][j], ratio = rows->scale[TEACHER_RATIO][j];
    const float at_label = rows->scale[AT_LABEL][j], uniform = rows->scale[UNIFORM][j];
    const int64_t label = rows->label[j];
    const int label_is_top = rows->label_logit[STUDENT][j] == rows->peak[STUDENT][j];
    const int64_t top = label_is_top ? label : soft_others < 1 ? rows->top[j] : -1;
    float hard = hard_scale - uniform;
    if (top != label)
        student[label * tile->class_pitch] -= at_label;
    else if (others < 1)
        hard = uniform * (float)(job->classes - 1) - hard_scale * others;
    else
        hard -= at_label;
    if (top < 0)
        return;
    const float teacher_soft = teacher[top * tile->class_pitch];
    float soft = 1 - ratio * teacher_soft;
    if (soft_others < 1 && teacher_soft == 1)
        soft = ratio * rows->sum[TEACHER_SOFT_OTHERS][j] - soft_others;
    student[top * tile->class_pitch] = hard + rows->scale[SOFT_SCALE][j] * soft;
}

INLINE int64_t label_of(const Job *job, int64_t row)
{
    int64_t label;
    memcpy(&label, (char *)job->target + row * 8, sizeof label); /* may be misaligned */
    return label;
}

/* Losses (or terms) and gradients of the tile's rows from `i` on, at most one per lane. */
INLINE void work_on_rows(const Job *job, const Tile *tile, int64_t i, Rows *rows, const int kind,
                         const int lanes)
{
    const int64_t offset = i * tile->row_pitch;
    const int64_t row = tile->first + i;
    const int n = tile->rows - i < lanes ? (int)(tile->rows - i) : lanes;
    const int calls = tile->pixels ? 1 : n;
    float results[4][LANES];
    EACH_LANE rows->label[l] = -1;
    for (int j = 0; j < n; j++) {
        const int64_t label = label_of(job, row + j);
        const int64_t place = offset + j * tile->row_pitch + label * tile->class_pitch;
        if (label == job->ignore_index)
            continue;
        rows->label[j] = (int32_t)label;
        rows->label_logit[STUDENT][j] = tile->x[STUDENT][place];
        rows->label_logit[TEACHER][j] = tile->x[TEACHER][place];
    }
    for (int j = 0; j < calls; j++)
        if (tile->pixels || rows->label[j] >= 0)
            statistics(job, tile, i + j, j, rows, kind, lanes);
    combine(job, rows, results, lanes);
    for (int term = 0; term < (job->terms ? 4 : 1); term++) {
        float *out = (float *)job->out + term * job->batches * job->rows + row;
        memcpy(out, results[term], n * sizeof(float));
    }
    if (!job->gradient.address)
        return;
    for (int j = 0; j < calls; j++)
        if (tile->pixels || rows->label[j] >= 0)
            gradient(job, tile, offset + j * tile->row_pitch, j, rows, kind, lanes);
    for (int j = 0; j < n; j++)
        if (rows->label[j] >= 0)
            gradient_at_label_and_top(job, tile, offset + j * tile->row_pitch, j, rows);
        else
            for (int64_t c = 0; c < job->classes; c++)
                tile->x[STUDENT][offset + j * tile->row_pitch + c * tile->class_pitch] = 0;
}

INLINE View view_of(const Job *job, const Logits *logits, int64_t tile)
{
    const int64_t size = SIZE[logits->dtype];
    const int64_t batch = tile / job->tiles_per_batch;
    const int64_t row = tile % job->tiles_per_batch * job->tile_rows;
    const int64_t address = logits->address + (batch * logits->batch + row * logits->row) * size;
    const View view = {(char *)address, logits->row * size, logits->class_ * size};
    return view;
}

INLINE void load_line(const char *from, int64_t stride, float *to, int64_t length, const int dtype)
{
    for (int64_t i = 0; i < length; i++)
        to[i] = load(from + i * stride, dtype);
}

INLINE void store_line(char *to, int64_t stride, float *from, int64_t length, const int dtype)
{
    for (int64_t i = 0; i < length; i++)
        store(to + i * stride, from[i], dtype);
}

/* The dtype, and the stride if elements are neighbours, become constants: vectors need them. */
#define WITH_STRIDE(function, address, stride, line, length, dtype) \
    (stride == SIZE[dtype] ? function(address, SIZE[dtype], line, length, dtype) \
                           : function(address, stride, line, length, dtype))
#define WITH_DTYPE(function, address, stride, line, length, dtype) \
    (dtype == FLOAT32    ? WITH_STRIDE(function, address, stride, line, length, FLOAT32) \
     : dtype == BFLOAT16 ? WITH_STRIDE(function, address, stride, line, length, BFLOAT16) \
                         : WITH_STRIDE(function, address, stride, line, length, FLOAT16))

INLINE void load_tile(const Job *job, const Logits *logits, const Tile *tile, float *line)
{
    const View view = view_of(job, logits, tile->index);
    const int64_t between = tile->pixels ? view.class_ : view.row;
    const int64_t stride = tile->pixels ? view.row : view.class_;
    for (int64_t j = 0; j < tile->lines; j++, line += tile->line_pitch) {
        const char *address = view.address + j * between;
        if (!tile->pixels && label_of(job, tile->first + j) == job->ignore_index)
            continue; /* saves the time; with pixels a line holds many rows */
        WITH_DTYPE(load_line, address, stride, line, tile->length, logits->dtype);
        for (int64_t k = tile->length; k < tile->line_pitch && !tile->pixels; k++)
            line[k] = line[0]; /* padding does not change the maximum */
    }
}

INLINE void store_tile(const Job *job, const Logits *logits, const Tile *tile, float *line)
{
    const View view = view_of(job, logits, tile->index);
    const int64_t between = tile->pixels ? view.class_ : view.row;
    const int64_t stride = tile->pixels ? view.row : view.class_;
    const float *loss = (float *)job->out + tile->first;
    for (int64_t j = 0; j < tile->lines; j++, line += tile->line_pitch) {
        char *address = view.address + j * between;
        if (!tile->pixels && loss[j] != loss[j])
            continue; /* Python recomputes the row from logits that this may overwrite */
        WITH_DTYPE(store_line, address, stride, line, tile->length, logits->dtype);
    }
}

INLINE void work_on_tiles(int64_t begin, int64_t end, Job *job, const int lanes)
{
    const int64_t padded = (job->classes + lanes - 1) / lanes * lanes;
    const int64_t size = job->tile_rows * (job->pixels ? job->classes : padded);
    const int kind = job->temperature == 1 ? T_IS_1 : job->temperature == 2 ? T_IS_2 : ANY_T;
    float *x = malloc((kind == ANY_T ? 3 : 2) * size * sizeof(float));
    Tile tile = {.x = {x, x + size}, .e = x + 2 * size, .pixels = job->pixels};
    Rows rows = {0};
    if (!x) {
        job->out_of_memory = 1;
        return;
    }
    tile.row_pitch = job->pixels ? 1 : padded;
    tile.class_pitch = job->pixels ? job->tile_rows : 1;
    tile.line_pitch = job->pixels ? job->tile_rows : padded;
    tile.steps = job->pixels ? job->classes : padded / lanes;
    tile.step_pitch = job->pixels ? job->tile_rows : lanes;
    for (tile.index = begin; tile.index < end; tile.index++) {
        const int64_t row = tile.index % job->tiles_per_batch * job->tile_rows;
        tile.first = tile.index / job->tiles_per_batch * job->rows + row;
        tile.rows = job->rows - row < job->tile_rows ? job->rows - row : job->tile_rows;
        tile.lines = job->pixels ? job->classes : tile.rows;
        tile.length = job->pixels ? tile.rows : job->classes;
        tile.prefetch[0] = view_of(job, &job->student, tile.index + 1);
        tile.prefetch[1] = view_of(job, &job->teacher, tile.index + 1);
        tile.prefetch[2] = view_of(job, &job->gradient, tile.index);
        load_tile(job, &job->student, &tile, tile.x[STUDENT]);
        load_tile(job, &job->teacher, &tile, tile.x[TEACHER]);
        for (int64_t i = 0; i < tile.rows; i += lanes)
            if (kind == T_IS_1)
                work_on_rows(job, &tile, i, &rows, T_IS_1, lanes);
            else if (kind == T_IS_2)
                work_on_rows(job, &tile, i, &rows, T_IS_2, lanes);
            else
                work_on_rows(job, &tile, i, &rows, ANY_T, lanes);
        if (job->gradient.address)
            store_tile(job, &job->gradient, &tile, tile.x[STUDENT]);
    }
    free(x);
}

typedef void Work(int64_t begin, int64_t end, void *job);
typedef int32_t ParallelFor(int64_t begin, int64_t end, int64_t grain, Work *work, void *job);

static void baseline(int64_t begin, int64_t end, void *job) { work_on_tiles(begin, end, job, 8); }
static Work *work = baseline;

#if defined(__x86_64__) && defined(__GNUC__)
#ifdef __clang__
#define WIDE "" /* clang knows no such option, and would ignore all of the attribute */
#else
#define WIDE ",prefer-vector-width=512"
#endif
#define TARGET(features) __attribute__((target(features))) static void
TARGET("avx2,fma")
avx2(int64_t begin, int64_t end, void *job) { work_on_tiles(begin, end, job, 8); }
TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma" WIDE)
avx512(int64_t begin, int64_t end, void *job) { work_on_tiles(begin, end, job, 16); }
#endif

/* The number of rows that are not ignored, or -1 with an exception for a label out of range. */
static int64_t count_rows(const Job *job)
{
    const long long classes = job->classes, ignored = job->ignore_index;
    int64_t counted = 0;
    for (int64_t row = 0; row < job->batches * job->rows; row++) {
        const long long label = label_of(job, row);
        counted += label != ignored;
        if (label != ignored && (label < 0 || label >= classes)) {
            PyErr_Format(PyExc_IndexError,
                         "target must hold class indices in [0, %lld) or ignore_index (%lld), "
                         "got %lld", classes, ignored, label);
            return -1;
        }
    }
    return counted;
}

static int64_t clamp(int64_t value, int64_t least, int64_t most)
{
    return value < least ? least : value > most ? most : value;
}

static void plan_tiles(Job *job)
{
    job->pixels = job->rows > 1 && job->student.row == 1 && job->student.class_ != 1;
    const int64_t pixels = PIXELS_TILE_LOGITS / job->classes / LANES * LANES;
    const int64_t rows = ROWS_TILE_LOGITS / job->classes;
    job->tile_rows = job->pixels ? clamp(pixels, LANES, PIXELS_TILE_ROWS) : clamp(rows, 1, LANES);
    job->tiles_per_batch = (job->rows + job->tile_rows - 1) / job->tile_rows;
}

/* run(parallel_for, (B, C, R), student, teacher, gradient, target, out, loss, options,
 * weight_scale) returns how many rows are left to Python, and how many are not ignored. Tensors are addresses; logits are
 * (address, strides, dtype). parallel_for: address of torch's function, or 0 for one thread. */
static PyObject *run(PyObject *module, PyObject *arguments)
{
    Job job = {0};
    Logits *s = &job.student, *t = &job.teacher, *g = &job.gradient;
    Py_ssize_t parallel_for;
    double temperature, alpha, hard_weight, smoothing, weight_scale;
    const char *reduction;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "n(nnn)(n(nnn)i)(n(nnn)i)(n(nnn)i)nnn(ddddLs)d",
                          &parallel_for, &job.batches, &job.classes, &job.rows,
                          &s->address, &s->batch, &s->class_, &s->row, &s->dtype,
                          &t->address, &t->batch, &t->class_, &t->row, &t->dtype,
                          &g->address, &g->batch, &g->class_, &g->row, &g->dtype,
                          &job.target, &job.out, &job.loss,
                          &temperature, &alpha, &hard_weight, &smoothing, &job.ignore_index,
                          &reduction, &weight_scale))
        return NULL;
    const int64_t counted = count_rows(&job);
    if (counted < 0)
        return NULL;
    const double row_share = strcmp(reduction, "mean") ? 1 : 1.0 / (double)counted;
    job.temperature = (float)temperature;
    job.soft_weight = (float)(alpha * temperature);
    job.hard_weight = (float)hard_weight;
    job.weight_scale = (float)weight_scale;
    job.smoothing = (float)smoothing;
    job.row_share = (float)row_share;
    job.terms = !strcmp(reduction, "terms");
    plan_tiles(&job);

    const int64_t tiles = job.batches * job.tiles_per_batch;
    const int64_t grain = GRAIN / (job.tile_rows * job.classes) + 1;
    Py_BEGIN_ALLOW_THREADS
    if (parallel_for && tiles > grain)
        ((ParallelFor *)parallel_for)(0, tiles, grain, work, &job);
    else
        work(0, tiles, &job);
    Py_END_ALLOW_THREADS
    if (job.out_of_memory)
        return PyErr_NoMemory();

    const float *out = (float *)job.out;
    double sum = 0;
    long long non_finite = 0;
    for (int64_t row = 0; row < job.batches * job.rows; row++) {
        sum += out[row];
        non_finite += out[row] != out[row];
    }
    if (job.loss && job.loss != job.out)
        *(float *)job.loss = (float)(sum * row_share);
    return Py_BuildValue("LL", non_finite, (long long)counted);
}

static PyMethodDef methods[] = {{"run", run, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "cpu_kernel", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_cpu_kernel(void)
{
#ifdef TARGET
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        work = avx2;
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        work = avx512;
#endif
    return PyModule_Create(&definition);
}
