/* The closed form of `_eager.py` as one loop over a row while it is in the cache: statistics, combine, gradient.
 *
 * Logits are (B, C, R) with any strides. A tile of rows is copied as float32 into scratch memory, where the lanes of a
 * vector lie on classes of one row or, where rows are neighbours in memory (pixels), on rows. Lanes are plain arrays:
 * the compiler makes vectors of the loops over them, for every instruction set from the same text.
 *
 * A row whose numbers are not finite leaves NaN as its loss, and the caller does that row again by other means. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EPS 1e-7f           /* of the official code: keeps the weight finite where the teacher's cross-entropy is 0 */
#define LANES 16            /* at most; `lanes` is a constant wherever it is used */
#define BLOCK 64            /* terms that a lane adds up in float before they join the total in double */
#define ROWS_LOGITS 2048    /* of one set in a tile of several rows: both sets stay in the first cache */
#define PIXELS 128          /* in a tile at most */
#define PIXELS_LOGITS 16384
#define GRAIN 3072          /* logits that are worth another thread */
#define BOTH for (int i = 0; i < 2; i++) /* sets of logits: 0 the student's, 1 the teacher's */

#ifdef __GNUC__
#define FN static inline __attribute__((always_inline)) /* compiled for the instruction set of its caller */
#define EACH_LANE _Pragma("omp simd") for (int l = 0; l < lanes; l++)
#define ADD_LANES(sum) _Pragma("omp simd reduction(+:sum)") for (int l = 0; l < lanes; l++)
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define FN static inline
#define EACH_LANE for (int l = 0; l < lanes; l++)
#define ADD_LANES(sum) EACH_LANE
#define PREFETCH(address) (void)(address)
#endif

enum { FLOAT32, BFLOAT16, FLOAT16 };
static const int SIZE[] = {4, 2, 2};

typedef struct {
    Py_ssize_t address, batch, class_, row; /* strides in elements */
    int dtype;
} Logits;

typedef struct {
    Logits student, teacher, gradient; /* an address of 0: there is none */
    Py_ssize_t target, upstream, loss; /* addresses of int64, float32, float32; but for the target, 0: there is none */
    Py_ssize_t out; /* address of every row's loss, or with `terms` student CE, teacher CE, weight and soft term */
    Py_ssize_t batches, classes, rows, tile; /* tile: rows in it */
    long long ignore_index;
    float temperature, soft_weight, hard_weight, smoothing, scale; /* soft_weight: alpha * T; scale: of the gradient */
    int terms, pixels; /* pixels: lanes lie on rows */
    volatile int out_of_memory;
} Job;

typedef struct { /* of bytes: where one begins, and how far apart its rows and the steps of the lanes are */
    char *address;
    int64_t row, step;
} Lines;

typedef struct {
    Lines soon[3]; /* to be fetched during the statistics, if they exist: the next tile's logits, this one's gradient */
    float *x[2], *e; /* logits, then exp(z / T), of both sets; the student's exp(z) where T is neither 1 nor 2 */
    int64_t row_pitch, class_pitch, steps, step; /* steps of the lanes over the classes, and how far apart they are */
    int pixels;
} Tile;

/* Sums over the classes; the rests leave out one maximum, whose exp is 1. Scales of the terms of the gradient. */
enum { REST, SOFT_REST, TEACHER_REST, TEACHER_SOFT_REST, DOT, Z_SUM, SUMS };
enum { HARD_SCALE, SOFT_SCALE, TEACHER_RATIO, UNIFORM, AT_LABEL, SCALES };

typedef struct { /* of as many rows as there are lanes */
    int32_t label[LANES], leader[LANES]; /* -1 where ignored; the student's maximum, if it has more than half */
    float label_logit[2][LANES], peak[2][LANES], sum[SUMS][LANES], unit[LANES], scale[SCALES][LANES];
} Rows;

FN int32_t bits(float v) { int32_t i; memcpy(&i, &v, sizeof i); return i; }
FN float value(int32_t i) { float v; memcpy(&v, &i, sizeof v); return v; }
FN int32_t choose_int(int condition, int32_t yes, int32_t no) { return no ^ ((yes ^ no) & -condition); }
FN float choose(int condition, float yes, float no) { return value(choose_int(condition, bits(yes), bits(no))); }
FN float where(int condition, float v) { return value(bits(v) & -condition); } /* masks: branches keep loops scalar */

FN float load(const char *from, const int dtype)
{
    float number;
    uint16_t half;
    memcpy(dtype == FLOAT32 ? (void *)&number : &half, from, SIZE[dtype]);
    if (dtype == FLOAT32)
        return number;
    if (dtype == BFLOAT16)
        return value((int32_t)((uint32_t)half << 16));
    const int32_t special = -((half & 0x7c00) == 0x7c00) & 0x7f800000, sign = (int32_t)((half & 0x8000u) << 16);
    return value(bits(value((half & 0x7fff) << 13) * 0x1p112f) | special | sign);
}

/* Rounds to the nearest, ties to even. */
FN void store(char *to, float number, const int dtype)
{
    const int32_t i = bits(number), size = i & 0x7fffffff, tiny = bits(value(size) + 0.5f) - 0x3f000000;
    const int32_t normal = (size - 0x37fff001 + ((size >> 13) & 1)) >> 13;
    const int32_t finite = choose_int(size < 0x38800000, tiny, normal), special = size > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint16_t float16 = (uint16_t)(((i >> 16) & 0x8000) | choose_int(size >= 0x47800000, special, finite));
    const uint16_t bfloat16 = (uint16_t)(((uint32_t)i + 0x7fff + ((i >> 16) & 1)) >> 16);
    if (dtype == FLOAT32)
        memcpy(to, &number, sizeof number);
    else
        memcpy(to, dtype == BFLOAT16 ? &bfloat16 : &float16, sizeof float16);
}

/* exp(x) - minus for x <= 0, as 2^n (1 + r + r^2 P(r)) to about 1 ulp; 0 where exp(x) would not be a normal number. */
FN float exp_less(float x, const float minus)
{
    const float shifted = x * 1.44269504f + 12583039.0f; /* 1.5 * 2^23 + 127: the low bits are the exponent of 2^n */
    const float n = shifted - 12583039.0f, power = value((int32_t)((uint32_t)bits(shifted) << 23));
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const float square = r * r, high = (r * 8.36941972e-3f + 4.16684560e-2f) + square * 1.38131401e-3f;
    const float p = (high * square + (r * 1.66665152e-1f + 0.49999994f)) * square + r;
    return where(!(x < -87.0f), p * power + (power - minus)); /* not below: NaN stays */
}

/* log(1 + x) for x >= 0 as log(u) + (x - (u - 1)) / u with u = 1 + x rounded; the logarithm is musl's. */
FN float log1p_(float x)
{
    const float u = x + 1.0f;
    const int32_t i = bits(u) - 0x3f3504f3; /* sqrt(1/2) */
    const float n = (float)(i >> 23), f = value((i & 0x7fffff) + 0x3f3504f3) - 1.0f;
    const float s = f / (f + 2.0f), z = s * s, w = z * z, half_square = f * f * 0.5f;
    const float polynomial = z * (w * 0.28498787f + 0.66666663f) + w * (w * 0.24279079f + 0.40000972f);
    const float low = n * 9.0580006e-06f + (x - (u - 1.0f)) / u;
    return s * (half_square + polynomial) + low - half_square + f + n * 0.69313812f;
}

/* Of one class: logit less the peak, exp(z / T), exp(z); the latter two, 0 where z is 0; whether it is less. */
typedef struct { float z, soft, e, other_soft, other_e; int32_t other; } Element;

FN Element element(float z, float temperature, const int kind)
{
    const float soft = exp_less(kind == 1 ? z : kind == 2 ? z * 0.5f : z * (1 / temperature), 0);
    const float e = kind == 1 ? soft : kind == 2 ? soft * soft : exp_less(z, 0);
    const int32_t other = z < 0;
    const float other_soft = where(other, soft), other_e = kind == 2 ? other_soft * other_soft : where(other, e);
    const Element found = {z, soft, e, other_soft, other_e, other};
    return found;
}

/* Into `rows`, from entry `j`: of one row, `row` of the tile, or of all where lanes lie on rows. exp(z / T) takes the
 * place of the logits. `kind` is the temperature where one exponential makes both, else 0. */
FN void statistics(const Job *job, const Tile *tile, int64_t row, Rows *rows, int j, const int kind, const int lanes)
{
    const int64_t at = row * tile->row_pitch;
    float *__restrict student = tile->x[0] + at, *__restrict teacher = tile->x[1] + at, *__restrict e = tile->e + at;
    const char *soon[3];
    for (int i = 0; i < 3; i++)
        soon[i] = tile->soon[i].address + row * tile->soon[i].row;
    float peak[2][LANES];
    int32_t others[2][LANES];
    double total[SUMS][LANES];
    BOTH EACH_LANE peak[i][l] = tile->x[i][at + l], others[i][l] = 0;
    for (int64_t k = 1; k < tile->steps; k++)
        EACH_LANE {
            const float s = student[k * tile->step + l], t = teacher[k * tile->step + l];
            peak[0][l] = s > peak[0][l] ? s : peak[0][l], peak[1][l] = t > peak[1][l] ? t : peak[1][l];
        }
    for (int i = 0; i < 2 && !tile->pixels; i++) {
        float highest = peak[i][0];
        for (int l = 1; l < lanes; l++)
            highest = peak[i][l] > highest ? peak[i][l] : highest;
        EACH_LANE peak[i][l] = highest;
        for (int64_t k = job->classes; k < tile->row_pitch; k++)
            tile->x[i][at + k] = highest; /* lanes beyond the last class: z is 0, as if there were none */
    }
    for (int i = 0; i < SUMS; i++)
        EACH_LANE total[i][l] = 0;
    for (int64_t k = 0; k < tile->steps;) {
        const int64_t end = tile->steps - k < BLOCK ? tile->steps : k + BLOCK;
        float sum[SUMS][LANES];
        for (int i = 0; i < SUMS; i++)
            EACH_LANE sum[i][l] = 0;
        for (; k < end; k++) {
            for (int i = 0; i < 3; i++)
                PREFETCH(soon[i]), soon[i] += tile->soon[i].step;
            EACH_LANE {
                const int64_t here = k * tile->step + l;
                const Element s = element(student[here] - peak[0][l], job->temperature, kind);
                const Element t = element(teacher[here] - peak[1][l], job->temperature, kind);
                student[here] = s.soft, teacher[here] = t.soft;
                if (!kind)
                    e[here] = s.e;
                sum[REST][l] += s.other_e, sum[SOFT_REST][l] += s.other_soft, others[0][l] += s.other;
                sum[TEACHER_REST][l] += t.other_e, sum[TEACHER_SOFT_REST][l] += t.other_soft, others[1][l] += t.other;
                sum[DOT][l] += t.soft * s.z, sum[Z_SUM][l] += s.z;
            }
        }
        for (int i = 0; i < SUMS; i++)
            EACH_LANE total[i][l] += sum[i][l];
    }
    for (int i = 0; i < SUMS && !tile->pixels; i++) {
        double sum = 0;
        ADD_LANES(sum) sum += total[i][l];
        total[i][0] = sum;
    }
    for (int i = 0; i < 2 && !tile->pixels; i++) {
        int32_t sum = 0;
        ADD_LANES(sum) sum += others[i][l];
        others[i][0] = sum;
    }
    for (int l = 0; l < (tile->pixels ? lanes : 1); l++) {
        for (int i = REST; i <= TEACHER_SOFT_REST; i++) /* maxima that stand beside the first */
            total[i][l] += (double)(job->classes - others[i / TEACHER_REST][l] - 1);
        BOTH rows->peak[i][j + l] = peak[i][l];
        for (int i = 0; i < SUMS; i++)
            rows->sum[i][j + l] = (float)total[i][l];
    }
}

/* The losses (or terms) of all rows into `results`, and the scales of their gradient. */
FN void combine(const Job *job, Rows *rows, float results[4][LANES], const int lanes)
{
    const float classes = (float)job->classes, temperature = job->temperature, smoothing = job->smoothing;
    const float hard_weight = job->hard_weight, soft_weight = job->soft_weight;
    const int terms = job->terms;
    EACH_LANE {
        const float rest = rows->sum[REST][l], soft_rest = rows->sum[SOFT_REST][l];
        const float teacher_rest = rows->sum[TEACHER_REST][l], teacher_soft_rest = rows->sum[TEACHER_SOFT_REST][l];
        const float dot = rows->sum[DOT][l], z_sum = rows->sum[Z_SUM][l];
        const float label_z = rows->label_logit[0][l] - rows->peak[0][l];
        const float teacher_label_z = rows->label_logit[1][l] - rows->peak[1][l];
        const float student_ce = log1p_(rest) - label_z, teacher_ce = log1p_(teacher_rest) - teacher_label_z;
        const float ratio = -student_ce / (teacher_ce + EPS);
        const float weight = 0.0f - exp_less(choose(ratio < -87.0f, -87.0f, ratio), 1);
        const float soft = log1p_(soft_rest) - dot / (temperature * (1 + teacher_soft_rest));
        const float hard = (1 - smoothing) * student_ce + smoothing * (log1p_(rest) - z_sum / classes);
        const float loss = hard_weight * hard + soft_weight * temperature * weight * soft;
        const float odd = (dot + label_z + teacher_label_z) * 0.0f; /* NaN where anything is not finite */
        const int kept = rows->label[l] >= 0;
        results[0][l] = where(kept, choose(terms, student_ce, loss) + odd);
        results[1][l] = where(kept, teacher_ce), results[2][l] = where(kept, weight), results[3][l] = where(kept, soft);
        const float hard_unit = rows->unit[l] * hard_weight;
        rows->scale[HARD_SCALE][l] = hard_unit / (1 + rest);
        rows->scale[SOFT_SCALE][l] = rows->unit[l] * soft_weight * weight / (1 + soft_rest);
        rows->scale[TEACHER_RATIO][l] = (1 + soft_rest) / (1 + teacher_soft_rest);
        rows->scale[UNIFORM][l] = hard_unit * (smoothing / classes);
        rows->scale[AT_LABEL][l] = hard_unit * (1 - smoothing);
    }
}

/* In place of exp(z / T), the gradient of row `j`, or of all where lanes lie on rows, but for what `gradient_at` mends;
 * and who leads. */
FN void gradient(const Job *job, const Tile *tile, int64_t at, Rows *rows, int j, const int kind, const int lanes)
{
    float *__restrict student = tile->x[0] + at, scale[SCALES][LANES];
    const float *__restrict teacher = tile->x[1] + at, *__restrict e_in = tile->e + at;
    int32_t kept[LANES], leader[LANES];
    EACH_LANE leader[l] = -1;
    for (int64_t c = tile->pixels ? tile->row_pitch : job->classes; c < tile->row_pitch; c++)
        student[c] = 0; /* lanes beyond the last class do not lead */
    EACH_LANE kept[l] = rows->label[tile->pixels ? l : j] >= 0;
    for (int i = 0; i < SCALES; i++)
        EACH_LANE scale[i][l] = rows->scale[i][tile->pixels ? l : j];
    for (int64_t k = 0; k < tile->steps; k++)
        EACH_LANE {
            const int64_t here = k * tile->step + l;
            const float soft = student[here], e = kind == 1 ? soft : kind == 2 ? soft * soft : e_in[here];
            const float hard = scale[HARD_SCALE][l] * e - scale[UNIFORM][l];
            const float difference = soft - scale[TEACHER_RATIO][l] * teacher[here];
            student[here] = where(kept[l], hard + scale[SOFT_SCALE][l] * difference);
            leader[l] = choose_int(soft == 1, (int32_t)k, leader[l]);
        }
    if (tile->pixels)
        EACH_LANE rows->leader[l] = leader[l];
    for (int l = 0; l < lanes && !tile->pixels && rows->sum[SOFT_REST][j] < 1; l++)
        rows->leader[j] = leader[l] < 0 ? rows->leader[j] : leader[l] * lanes + l;
}

/* That of row `j` at its label and at `leader`, its maximum. Where that has more than half, p - 1 is -rest / (1 + rest)
 * there: no difference of two numbers near 1. */
FN void gradient_at(const Job *job, const Tile *tile, int64_t at, const Rows *rows, int j)
{
    float *student = tile->x[0] + at + j * tile->row_pitch, *teacher = tile->x[1] + at + j * tile->row_pitch;
    const float rest = rows->sum[REST][j], soft_rest = rows->sum[SOFT_REST][j];
    const float hard_scale = rows->scale[HARD_SCALE][j], ratio = rows->scale[TEACHER_RATIO][j];
    const float at_label = rows->scale[AT_LABEL][j], uniform = rows->scale[UNIFORM][j];
    const int64_t other = soft_rest < 1 ? rows->leader[j] : -1;
    const int64_t leader = rows->label_logit[0][j] == rows->peak[0][j] ? rows->label[j] : other;
    float hard = hard_scale - uniform, soft;
    if (leader == rows->label[j])
        hard = rest < 1 ? uniform * (float)(job->classes - 1) - hard_scale * rest : hard - at_label;
    else
        student[rows->label[j] * tile->class_pitch] -= at_label;
    if (leader < 0)
        return;
    soft = 1 - ratio * teacher[leader * tile->class_pitch];
    if (soft_rest < 1 && teacher[leader * tile->class_pitch] == 1)
        soft = ratio * rows->sum[TEACHER_SOFT_REST][j] - soft_rest;
    student[leader * tile->class_pitch] = hard + rows->scale[SOFT_SCALE][j] * soft;
}

FN int64_t label_of(const Job *job, int64_t row)
{
    int64_t label;
    memcpy(&label, (char *)job->target + row * 8, sizeof label);
    return label;
}

/* Loss (or terms) and gradient of `n` rows, at most one a lane: `first` of the tile, `row` of all, and those behind. */
FN void rows_of(const Job *job, const Tile *tile, int64_t first, int64_t row, int n, Rows *rows, int kind, int lanes)
{
    const int64_t at = first * tile->row_pitch;
    const int runs = tile->pixels ? 1 : n;
    float results[4][LANES];
    EACH_LANE rows->label[l] = -1;
    for (int j = 0; j < n; j++) {
        float upstream = 1;
        if (label_of(job, row + j) == job->ignore_index)
            continue;
        if (job->upstream)
            memcpy(&upstream, (char *)job->upstream + (row + j) * 4, sizeof upstream);
        rows->label[j] = (int32_t)label_of(job, row + j), rows->unit[j] = job->scale * upstream;
        BOTH rows->label_logit[i][j] = tile->x[i][at + j * tile->row_pitch + rows->label[j] * tile->class_pitch];
    }
    for (int j = 0; j < runs; j++)
        if (tile->pixels || rows->label[j] >= 0)
            statistics(job, tile, first + j, rows, j, kind, lanes);
    combine(job, rows, results, lanes);
    for (int i = 0; i < (job->terms ? 4 : 1); i++)
        memcpy((float *)job->out + i * job->batches * job->rows + row, results[i], n * sizeof(float));
    if (!job->gradient.address)
        return;
    for (int j = 0; j < runs; j++)
        gradient(job, tile, at + j * tile->row_pitch, rows, j, kind, lanes);
    for (int j = 0; j < n; j++)
        if (rows->label[j] >= 0)
            gradient_at(job, tile, at, rows, j);
}

/* Of the tensor's logits from row `r` on, as the lanes will walk them. */
FN Lines lines_of(const Logits *logits, int64_t b, int64_t r, int64_t classes)
{
    const int size = SIZE[logits->dtype];
    char *address = (char *)logits->address + (b * logits->batch + r * logits->row) * size;
    const Lines lines = {address, logits->row * size, classes * logits->class_ * size};
    return lines;
}

/* Between a line of a tensor and one of a tile. */
FN void line(char *data, int64_t stride, float *floats, int64_t length, const int dtype, const int out)
{
    for (int64_t i = 0; i < length; i++)
        if (out)
            store(data + i * stride, floats[i], dtype);
        else
            floats[i] = load(data + i * stride, dtype);
}

/* Between a tensor and set `i` of a tile, by lines: the classes of one row, or the pixels of one class. */
FN void copy(const Job *job, const Logits *logits, int64_t b, int64_t r, int64_t n, Tile *tile, int i, const int out)
{
    const int pixels = tile->pixels;
    const Lines from = lines_of(logits, b, r, 1);
    const int64_t lines = pixels ? job->classes : n, length = pixels ? n : job->classes;
    const int64_t far = pixels ? from.step : from.row, near = pixels ? from.row : from.step;
    const int64_t pitch = pixels ? tile->class_pitch : tile->row_pitch;
    char *data = from.address;
    float *floats = tile->x[i];
    for (int64_t j = 0; j < lines; j++, data += far, floats += pitch) {
        const int64_t row = b * job->rows + r + j;
        const float *loss = (float *)job->out + row;
        if (!pixels && (out ? *loss != *loss : label_of(job, row) == job->ignore_index))
            continue; /* what is left to other means may stand where its gradient will be */
#define LINE(dtype) (near == SIZE[dtype] ? line(data, SIZE[dtype], floats, length, dtype, out) \
                                        : line(data, near, floats, length, dtype, out))
        logits->dtype == FLOAT32 ? LINE(FLOAT32) : logits->dtype == BFLOAT16 ? LINE(BFLOAT16) : LINE(FLOAT16);
        for (int64_t k = length; !out && !pixels && k < pitch; k++)
            floats[k] = floats[0]; /* lanes beyond the last class: no other maximum */
    }
}

FN void tiles(int64_t begin, int64_t end, Job *job, const int lanes)
{
    const int64_t pitch = job->pixels ? job->tile : (job->classes + lanes - 1) / lanes * lanes;
    const int64_t logits = pitch * (job->pixels ? job->classes : job->tile);
    const int64_t in_batch = (job->rows + job->tile - 1) / job->tile;
    const int kind = job->temperature == 1 ? 1 : job->temperature == 2 ? 2 : 0;
    float *x = malloc((kind ? 2 : 3) * logits * sizeof(float));
    Tile tile = {{{0}}, {x, x + logits}, x + 2 * logits, pitch, 1, pitch / lanes, lanes, job->pixels};
    Rows rows = {0};
    if (!x) {
        job->out_of_memory = 1;
        return;
    }
    if (job->pixels)
        tile.row_pitch = 1, tile.class_pitch = tile.step = pitch, tile.steps = job->classes;
    for (; begin < end; begin++) {
        const int64_t b = begin / in_batch, r = begin % in_batch * job->tile;
        const int64_t next_b = (begin + 1) / in_batch, next_r = (begin + 1) % in_batch * job->tile;
        tile.soon[0] = lines_of(&job->student, next_b, next_r, tile.pixels ? 1 : lanes);
        tile.soon[1] = lines_of(&job->teacher, next_b, next_r, tile.pixels ? 1 : lanes);
        tile.soon[2] = lines_of(&job->gradient, b, r, tile.pixels ? 1 : lanes);
        const int64_t n = job->rows - r < job->tile ? job->rows - r : job->tile;
        copy(job, &job->student, b, r, n, &tile, 0, 0);
        copy(job, &job->teacher, b, r, n, &tile, 1, 0);
        for (int64_t i = 0; i < n; i += lanes) {
            const int64_t row = b * job->rows + r + i;
            const int left = n - i < lanes ? (int)(n - i) : lanes;
            kind == 1   ? rows_of(job, &tile, i, row, left, &rows, 1, lanes)
            : kind == 2 ? rows_of(job, &tile, i, row, left, &rows, 2, lanes)
                        : rows_of(job, &tile, i, row, left, &rows, 0, lanes);
        }
        if (job->gradient.address)
            copy(job, &job->gradient, b, r, n, &tile, 0, 1);
    }
    free(x);
}

typedef void Work(int64_t begin, int64_t end, void *job);
typedef int32_t ParallelFor(int64_t begin, int64_t end, int64_t grain, Work *work, void *job);

static void baseline(int64_t begin, int64_t end, void *job) { tiles(begin, end, job, 8); }
static Work *chosen = baseline;
#if defined(__x86_64__) && defined(__GNUC__)
#define TARGET(features) __attribute__((target(features))) static void
TARGET("avx2,fma") avx2(int64_t begin, int64_t end, void *job) { tiles(begin, end, job, 8); }
TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
avx512(int64_t begin, int64_t end, void *job) { tiles(begin, end, job, 16); }
#endif

/* How many rows count in the mean, or -1 with an exception. */
static int64_t count(const Job *job)
{
    int64_t kept = 0;
    for (int64_t row = 0; row < job->batches * job->rows; row++) {
        const long long label = label_of(job, row), classes = job->classes, ignored = job->ignore_index;
        kept += label != ignored;
        if (label != ignored && (label < 0 || label >= classes)) {
            const char *message = "target must hold class indices in [0, %lld) or ignore_index (%lld), got %lld";
            PyErr_Format(PyExc_IndexError, message, classes, ignored, label);
            return -1;
        }
    }
    return kept;
}

static PyObject *run(PyObject *module, PyObject *arguments)
{
    Job job = {0};
    Logits *s = &job.student, *t = &job.teacher, *g = &job.gradient;
    Py_ssize_t address;
    double temperature, alpha, hard_weight, smoothing;
    const char *reduction;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "n(nnn)(n(nnn)i)(n(nnn)i)(n(nnn)i)nnnn(ddddLs)",
                          &address, &job.batches, &job.classes, &job.rows,
                          &s->address, &s->batch, &s->class_, &s->row, &s->dtype,
                          &t->address, &t->batch, &t->class_, &t->row, &t->dtype,
                          &g->address, &g->batch, &g->class_, &g->row, &g->dtype,
                          &job.target, &job.out, &job.loss, &job.upstream,
                          &temperature, &alpha, &hard_weight, &smoothing, &job.ignore_index, &reduction))
        return NULL;
    const int64_t kept = count(&job);
    if (kept < 0)
        return NULL;
    job.terms = !strcmp(reduction, "terms");
    const double over = strcmp(reduction, "mean") ? 1 : 1.0 / (double)kept;
    job.temperature = (float)temperature, job.soft_weight = (float)(alpha * temperature);
    job.hard_weight = (float)hard_weight, job.smoothing = (float)smoothing, job.scale = (float)over;

    job.pixels = job.rows > 1 && s->row == 1 && s->class_ != 1;
    job.tile = job.pixels ? PIXELS_LOGITS / job.classes / LANES * LANES : ROWS_LOGITS / job.classes;
    const int64_t least = job.pixels ? LANES : 1, most = job.pixels ? PIXELS : LANES;
    job.tile = job.tile < least ? least : job.tile > most ? most : job.tile;
    const int64_t number = (job.rows + job.tile - 1) / job.tile * job.batches;
    const int64_t grain = GRAIN / (job.tile * job.classes) + 1;
    ParallelFor *parallel_for = (ParallelFor *)address;
    Py_BEGIN_ALLOW_THREADS
    if (parallel_for && number > grain)
        parallel_for(0, number, grain, chosen, &job);
    else
        chosen(0, number, &job);
    Py_END_ALLOW_THREADS
    if (job.out_of_memory)
        return PyErr_NoMemory();

    const float *out = (float *)job.out;
    double sum = 0;
    long long odd = 0;
    for (int64_t row = 0; row < job.batches * job.rows; row++)
        sum += out[row], odd += out[row] != out[row];
    if (job.loss && job.loss != job.out)
        *(float *)job.loss = (float)(sum * over);
    return Py_BuildValue("LL", odd, (long long)kept);
}

static PyMethodDef methods[] = {{"run", run, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_rows", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__rows(void)
{
#ifdef TARGET
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        chosen = avx2;
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        chosen = avx512;
#endif
    return PyModule_Create(&definition);
}
