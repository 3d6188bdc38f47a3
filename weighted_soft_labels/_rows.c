/* The closed form of `_eager.py` as one loop over a row while it is in the cache: statistics, combine, gradient.
 *
 * Logits are (B, C, R) with any strides. A tile of rows is copied as float32 into scratch memory, where the lanes of a
 * vector lie on classes of one row or, where rows are neighbours in memory (pixels), on rows. What follows is the same
 * for both: class c of row r of a tile is at r * row_pitch + c * class_pitch.
 *
 * A row whose numbers are not finite leaves NaN as its loss, and the caller does that row again by other means.
 *
 * The file includes itself once for each instruction set: GCC lowers vector types to the instructions of the function
 * in which they are written, so one inline function cannot serve several. */
#ifndef ISA
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EPS 1e-7f            /* of the official code: keeps the weight finite where the teacher's cross-entropy is 0 */
#define BLOCK 64             /* terms that a lane adds up before they join the compensated total */
#define ROWS 16              /* in a tile at most, and what pixels are a multiple of: the lanes of any instruction set */
#define ROWS_LOGITS 2048     /* of one set in a tile of several rows: both sets stay in the first cache */
#define PIXELS 128           /* in a tile at most */
#define PIXELS_LOGITS 16384
#define GRAIN 16384          /* logits that are worth another thread */

enum { FLOAT32, BFLOAT16, FLOAT16, INT64 };
static const int SIZE[] = {4, 2, 2, 8};

/* Sums over the classes of one set of logits. REST, SOFT_REST, LABEL_REST leave out one maximum, whose exp is 1. */
enum { REST, SOFT_REST, DOT, Z_SUM, LABEL_Z, LABEL_SUM, LABEL_REST, SUMS };

typedef struct {
    char *data; /* NULL: there is none */
    int64_t batch, class_, row; /* strides in bytes */
    int dtype;
} Tensor;

typedef struct {
    int64_t batches, classes, rows, ignore_index;
    float temperature, soft_weight, hard_weight, smoothing, scale; /* soft_weight: alpha * T; scale: of the gradient */
    Tensor student, teacher, target, upstream, gradient;
    float *out;   /* the losses, or student CE, teacher CE, weight and soft term */
    int terms;    /* which of them */
    int pixels;   /* lanes lie on rows */
    int64_t tile; /* rows in a tile */
    volatile int out_of_memory;
} Job;

static int64_t label_of(const Job *job, int64_t b, int64_t r)
{
    int64_t label;
    memcpy(&label, job->target.data + b * job->target.batch + r * job->target.row, sizeof label);
    return label;
}

static int is_kept(const Job *job, int64_t b, int64_t r)
{
    return job->target.dtype != INT64 || label_of(job, b, r) != job->ignore_index;
}

#define NAME(name) PASTE(name, ISA)
#define PASTE(name, isa) PASTED(name, isa)
#define PASTED(name, isa) name##_##isa
#define V NAME(V)
#define I NAME(I)
#define U NAME(U)
#define H NAME(H)
#define Row NAME(Row)
#define Tile NAME(Tile)
#define get NAME(get)
#define put NAME(put)
#define all NAME(all)
#define all_int NAME(all_int)
#define bits NAME(bits)
#define value NAME(value)
#define where NAME(where)
#define choose NAME(choose)
#define widen NAME(widen)
#define narrow NAME(narrow)
#define exponentials NAME(exponentials)
#define log1p_ NAME(log1p_)
#define total NAME(total)
#define peaks NAME(peaks)
#define join_peak NAME(join_peak)
#define statistics NAME(statistics)
#define gradient_of NAME(gradient_of)
#define rows_of NAME(rows_of)
#define line_in NAME(line_in)
#define line_out NAME(line_out)
#define copy NAME(copy)
#define tiles NAME(tiles)
#else

#if LANES == 1 /* a compiler without vector types */
typedef float V;
typedef int32_t I;
typedef uint32_t U;
typedef uint16_t H;
#define MASK(condition) (-(condition))
#define CONVERT(value, type) ((type)(value))
#else
typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));
#define MASK(condition) (condition)
#define CONVERT(value, type) __builtin_convertvector(value, type)
#endif
#define LANE(vector, i) (((float *)&(vector))[i])
#define INT_LANE(vector, i) (((int32_t *)&(vector))[i])
#define BOTH for (int i = 0; i < 2; i++) /* sets of logits: 0 the student's, 1 the teacher's */

FN V get(const float *from) { V v; memcpy(&v, from, sizeof v); return v; }
FN void put(float *to, V v) { memcpy(to, &v, sizeof v); }
FN V all(float number) { V zero = {0}; return zero + number; }
FN I all_int(int32_t number) { I zero = {0}; return zero + number; }
FN I bits(V v) { I i; memcpy(&i, &v, sizeof i); return i; }
FN V value(I i) { V v; memcpy(&v, &i, sizeof v); return v; }
FN V where(I mask, V v) { return value(bits(v) & mask); }
FN V choose(I mask, V yes, V no) { return value((bits(yes) & mask) | (bits(no) & ~mask)); }

FN V widen(const char *from, const int dtype)
{
    H half;
    if (dtype == FLOAT32)
        return get((const float *)from);
    memcpy(&half, from, sizeof half);
    I i = CONVERT(half, I);
    if (dtype == BFLOAT16)
        return value((I)((U)i << 16));
    I special = MASK((i & 0x7c00) == 0x7c00) & 0x7f800000, sign = (I)((U)(i & 0x8000) << 16);
    return value(bits(value((i & 0x7fff) << 13) * 0x1p112f) | special | sign);
}

/* To the nearest, ties to even. */
FN void narrow(char *to, V v, const int dtype)
{
    if (dtype == FLOAT32) {
        memcpy(to, &v, sizeof v);
        return;
    }
    I i = bits(v), size = i & 0x7fffffff;
    if (dtype == BFLOAT16) {
        i = (I)((U)i + 0x7fff + (U)((i >> 16) & 1)) >> 16;
    } else {
        I normal = (size - 0x37fff001 + ((size >> 13) & 1)) >> 13, special = (MASK(size > 0x7f800000) & 0x200) | 0x7c00;
        I tiny = bits(value(size) + 0.5f) - 0x3f000000, is_tiny = MASK(size < 0x38800000), large = MASK(size >= 0x47800000);
        i = ((i >> 16) & 0x8000) | (tiny & is_tiny) | (special & large) | (normal & ~is_tiny & ~large);
    }
    H half = CONVERT(i, H);
    memcpy(to, &half, sizeof half);
}

/* exp(x) - minus for x <= 0, as 2^n (1 + r + r^2 P(r)) to about 1 ulp; 0 where exp(x) would not be a normal number.
 * Of `count` vectors step by step, as each step waits for its last one. */
FN void exponentials(const V *x, V *result, const int count, const float minus)
{
    V n[2], power[2], r[2], p[2];
#define EACH for (int i = 0; i < count; i++)
    EACH n[i] = x[i] * 1.44269504f + 12583039.0f; /* 1.5 * 2^23 + 127: the low bits are the exponent of 2^n */
    EACH power[i] = value((I)((U)bits(n[i]) << 23));
    EACH n[i] = n[i] - 12583039.0f;
    EACH r[i] = x[i] - n[i] * 0.693359375f;
    EACH r[i] = r[i] + n[i] * 2.12194440e-4f;
    EACH p[i] = r[i] * 1.38131401e-3f + 8.36941972e-3f;
    EACH p[i] = p[i] * r[i] + 4.16684560e-2f;
    EACH p[i] = p[i] * r[i] + 1.66665152e-1f;
    EACH p[i] = p[i] * r[i] + 0.49999994f;
    EACH p[i] = p[i] * (r[i] * r[i]) + r[i];
    EACH p[i] = p[i] * power[i] + (power[i] - minus);
    EACH result[i] = where(~MASK(x[i] < -87.0f), p[i]); /* not below: NaN stays */
#undef EACH
}

/* log(1 + x) for x >= 0 as log(u) + (x - (u - 1)) / u with u = 1 + x rounded; the logarithm is musl's. */
FN V log1p_(V x)
{
    V u = x + 1.0f;
    I i = bits(u) - 0x3f3504f3; /* sqrt(1/2) */
    V n = CONVERT(i >> 23, V), f = value((i & 0x7fffff) + 0x3f3504f3) - 1.0f;
    V s = f / (f + 2.0f), z = s * s, w = z * z, half_square = f * f * 0.5f;
    V polynomial = z * (w * 0.28498787f + 0.66666663f) + w * (w * 0.24279079f + 0.40000972f);
    return s * (half_square + polynomial) + (n * 9.0580006e-06f + (x - (u - 1.0f)) / u) - half_square + f + n * 0.69313812f;
}

#define HALVES(join) join(2) join(4) join(8) join(16) /* constant bounds, or the compiler leaves a loop */

FN float total(V v)
{
    float x[LANES];
    memcpy(x, &v, sizeof x);
#define JOIN(parts) for (int i = 0; i < LANES / parts; i++) x[i] += x[i + LANES / parts];
    HALVES(JOIN)
#undef JOIN
    return x[0];
}

typedef struct {
    float *x[2], *target, *e; /* logits, then exp(z / T), of both sets; probabilities; the student's exp(z) if T is odd */
    char *raw;                /* a line whose elements are not neighbours in memory */
    int64_t row_pitch, class_pitch, steps, step; /* steps of the lanes over the classes, and their distance */
    I first, next;                               /* classes of the first step, and how far the next one is */
} Tile;

/* What the loss needs to know of one set of logits; first for each lane's part of a row, where lanes lie on classes. */
typedef struct {
    V peak, sum[SUMS];
    I place; /* class of the maximum that is left out */
} Row;

NOINLINE void peaks(const Tile *tile, int64_t at, Row *row)
{
    const float *x[2] = {tile->x[0] + at, tile->x[1] + at};
    I index = tile->first, place[2] = {index, index};
    V peak[2] = {get(x[0]), get(x[1])};
    for (int64_t k = 1; k < tile->steps; k++) {
        index += tile->next;
        BOTH {
            V z = get(x[i] + k * tile->step);
            I higher = MASK(z > peak[i]);
            peak[i] = choose(higher, z, peak[i]);
            place[i] = (index & higher) | (place[i] & ~higher);
        }
    }
    BOTH row[i].peak = peak[i], row[i].place = place[i];
}

/* From each lane's maximum to that of the row, in all lanes. */
FN void join_peak(Row *row)
{
    float peak[LANES];
    int32_t place[LANES];
    memcpy(peak, &row->peak, sizeof peak), memcpy(place, &row->place, sizeof place);
#define JOIN(parts) for (int i = 0; i < LANES / parts; i++) { \
        const float other = peak[i + LANES / parts]; \
        const int32_t higher = -(other > peak[i]); /* a mask: which is higher cannot be foreseen */ \
        peak[i] = other > peak[i] ? other : peak[i]; \
        place[i] = (place[i + LANES / parts] & higher) | (place[i] & ~higher); \
    }
    HALVES(JOIN)
#undef JOIN
    row->peak = all(peak[0]), row->place = all_int(place[0]);
}

/* The sums of both sets over the classes, and exp(z / T) in place of the logits. */
FN void statistics(const Job *job, const Tile *tile, int64_t at, Row *row, const int kind, const int soft_target)
{
    float *restrict student = tile->x[0] + at, *restrict teacher = tile->x[1] + at, *restrict e_out = tile->e + at;
    const float *restrict target = tile->target + at, over = 1 / job->temperature;
    const V zero = all(0), peak[2] = {row[0].peak, row[1].peak};
    const I place[2] = {row[0].place, row[1].place}, ones = all_int(-1);
    V lost[2][SUMS];
    I index = tile->first;
    BOTH for (int j = 0; j < SUMS; j++)
        row[i].sum[j] = lost[i][j] = zero;
    for (int64_t k = 0; k < tile->steps;) {
        const int64_t end = tile->steps - k < BLOCK ? tile->steps : k + BLOCK;
        V part[2][SUMS] = {{zero, zero, zero, zero, zero, zero, zero}, {zero, zero, zero, zero, zero, zero, zero}};
        for (; k < end; k++, index += tile->next) {
            const int64_t here = k * tile->step;
            const I real = k < tile->steps - 1 ? ones : MASK(index < (int32_t)job->classes); /* lanes beyond the last class */
            V z[2] = {where(real, get(student + here) - peak[0]), where(real, get(teacher + here) - peak[1])};
            V z_over_t[2], soft[2], e[2];
            BOTH z_over_t[i] = kind == 1 ? z[i] : kind == 2 ? z[i] * 0.5f : z[i] * over;
            exponentials(z_over_t, soft, 2, 0);
            BOTH e[i] = kind == 1 ? soft[i] : soft[i] * soft[i];
            if (!kind)
                exponentials(z, e, 2, 0), put(e_out + here, e[0]);
            put(student + here, soft[0]), put(teacher + here, soft[1]);
            part[0][DOT] += soft[1] * z[0];
            part[0][Z_SUM] += z[0];
            BOTH {
                const I others = real & MASK(index != place[i]);
                part[i][REST] += where(others, e[i]);
                part[i][SOFT_REST] += where(others, soft[i]);
                if (soft_target) {
                    const V q = get(target + here);
                    part[i][LABEL_Z] += q * z[i];
                    part[i][LABEL_SUM] += where(real, q);
                    part[i][LABEL_REST] += where(others, q);
                }
            }
        }
        BOTH for (int j = 0; j < (soft_target ? SUMS : LABEL_Z); j++) {
            V more = part[i][j] - lost[i][j], grown = row[i].sum[j] + more;
            lost[i][j] = (grown - row[i].sum[j]) - more;
            row[i].sum[j] = grown;
        }
    }
}

/* In place of the student's exp(z / T), the gradient: its terms, without regard to the student's peak and the label. */
FN void gradient_of(const Tile *tile, int64_t at, const V *scale, I kept, const int kind, const int soft_target)
{
    float *restrict student = tile->x[0] + at;
    const float *restrict teacher = tile->x[1] + at, *restrict e_in = tile->e + at, *restrict target = tile->target + at;
    const V hard_scale = scale[0], soft_scale = scale[1], teacher_ratio = scale[2], uniform = scale[3], at_label = scale[4];
    for (int64_t k = 0, here = 0; k < tile->steps; k++, here += tile->step) {
        V soft = get(student + here), e = kind == 1 ? soft : kind == 2 ? soft * soft : get(e_in + here);
        V gradient = (hard_scale * e - uniform) + soft_scale * (soft - teacher_ratio * get(teacher + here));
        if (soft_target)
            gradient -= at_label * get(target + here);
        put(student + here, where(kept, gradient));
    }
}

/* Loss (or terms) and gradient of `n` rows, one a lane, from row `r` of the batch and offset `at` of the tile. */
FN void rows_of(const Job *job, const Tile *tile, int64_t at, int64_t b, int64_t r, int n, const int kind, const int soft_target)
{
    const float classes = (float)job->classes, temperature = job->temperature, smoothing = job->smoothing;
    Row row[2];
    V scale = all(job->scale);
    I label = all_int(-1); /* or 0, where probabilities take its place */
    memset(row, 0, sizeof row);
    for (int j = 0; j < n; j++) {
        if (!is_kept(job, b, r + j))
            continue;
        INT_LANE(label, j) = soft_target ? 0 : (int32_t)label_of(job, b, r + j);
        BOTH LANE(row[i].sum[LABEL_Z], j) = tile->x[i][at + j * tile->row_pitch + INT_LANE(label, j) * tile->class_pitch];
        if (job->upstream.data) {
            float upstream;
            memcpy(&upstream, job->upstream.data + b * job->upstream.batch + (r + j) * job->upstream.row, sizeof upstream);
            LANE(scale, j) *= upstream;
        }
    }
    const I kept = MASK(label >= 0);
    const V label_logit[2] = {row[0].sum[LABEL_Z], row[1].sum[LABEL_Z]};

    if (job->pixels) {
        peaks(tile, at, row);
        statistics(job, tile, at, row, kind, soft_target);
    }
    for (int j = 0; j < n && !job->pixels; j++) {
        Row lanes[2];
        if (INT_LANE(label, j) < 0)
            continue;
        peaks(tile, at + j * tile->row_pitch, lanes);
        join_peak(&lanes[0]), join_peak(&lanes[1]);
        statistics(job, tile, at + j * tile->row_pitch, lanes, kind, soft_target);
        BOTH {
            LANE(row[i].peak, j) = LANE(lanes[i].peak, 0), INT_LANE(row[i].place, j) = INT_LANE(lanes[i].place, 0);
            for (int sum = 0; sum < (soft_target ? SUMS : LABEL_Z); sum++)
                LANE(row[i].sum[sum], j) = total(lanes[i].sum[sum]);
        }
    }
    if (!soft_target)
        BOTH row[i].sum[LABEL_Z] = label_logit[i] - row[i].peak, row[i].sum[LABEL_SUM] = all(1);

    /* combine */
    const V *s = row[0].sum, *t = row[1].sum;
    V sum = s[REST] + 1.0f, soft_sum = s[SOFT_REST] + 1.0f, teacher_soft_sum = t[SOFT_REST] + 1.0f, log_sum = log1p_(s[REST]);
    V student_ce = s[LABEL_SUM] * log_sum - s[LABEL_Z], teacher_ce = t[LABEL_SUM] * log1p_(t[REST]) - t[LABEL_Z];
    V ratio = -student_ce / (teacher_ce + EPS), weight;
    ratio = choose(MASK(ratio < -87.0f), all(-87), ratio);
    exponentials(&ratio, &weight, 1, 1);
    weight = 0.0f - weight;
    V soft = log1p_(s[SOFT_REST]) - s[DOT] / (teacher_soft_sum * temperature);
    V hard = student_ce * (1 - smoothing) + (log_sum - s[Z_SUM] / classes) * smoothing;
    V odd = (s[DOT] + s[LABEL_Z] + t[LABEL_Z]) * 0.0f; /* NaN where anything is not finite */
    V loss = hard * job->hard_weight + weight * soft * job->soft_weight * temperature;
    V results[4] = {(job->terms ? student_ce : loss) + odd, teacher_ce, weight, soft};
    for (int j = 0; j < (job->terms ? 4 : 1); j++) {
        results[j] = where(kept, results[j]);
        memcpy(job->out + (j * job->batches + b) * job->rows + r, &results[j], n * sizeof(float));
    }
    if (!job->gradient.data)
        return;

    /* gradient */
    V hard_weight = scale * job->hard_weight, at_label = hard_weight * (1 - smoothing), teacher_ratio = soft_sum / teacher_soft_sum;
    V hard_scale = (at_label * s[LABEL_SUM] + hard_weight * smoothing) / sum, uniform = hard_weight * (smoothing / classes);
    V soft_scale = weight * scale * job->soft_weight / soft_sum;
    I leads = MASK(label == row[0].place);
    V q = where(leads, all(1)), q_rest = soft_target ? s[LABEL_REST] : 1.0f - q, teacher = all(0);
    for (int j = 0; j < n; j++) {
        const int64_t place = at + j * tile->row_pitch + INT_LANE(row[0].place, j) * tile->class_pitch;
        LANE(teacher, j) = tile->x[1][place];
        if (soft_target)
            LANE(q, j) = tile->target[place];
    }
    /* At the student's peak p - 1 is -rest / (1 + rest), wherever p is the nearer to 1: no difference of two such. */
    V sure = at_label * q_rest - hard_scale * s[REST] + uniform * (classes - 1);
    V at_peak = choose(MASK(s[REST] < 1.0f), sure, hard_scale - at_label * q - uniform);
    I both_sure = MASK(s[SOFT_REST] < 1.0f) & MASK(row[0].place == row[1].place);
    at_peak += soft_scale * choose(both_sure, teacher_ratio * t[SOFT_REST] - s[SOFT_REST], 1.0f - teacher_ratio * teacher);
    V scales[5] = {hard_scale, soft_scale, teacher_ratio, uniform, at_label}, lane[5];
    if (job->pixels)
        gradient_of(tile, at, scales, kept, kind, soft_target);
    for (int j = 0; j < n; j++) {
        float *student = tile->x[0] + at + j * tile->row_pitch;
        if (!job->pixels) {
            for (int i = 0; i < 5; i++)
                lane[i] = all(LANE(scales[i], j));
            gradient_of(tile, at + j * tile->row_pitch, lane, all_int(INT_LANE(kept, j)), kind, soft_target);
        }
        if (INT_LANE(kept, j)) {
            student[INT_LANE(row[0].place, j) * tile->class_pitch] = LANE(at_peak, j);
            if (!soft_target && !INT_LANE(leads, j))
                student[INT_LANE(label, j) * tile->class_pitch] -= LANE(at_label, j);
        }
    }
}

FN void line_in(const char *from, int64_t length, float *to, const int dtype)
{
    int64_t k = 0;
    for (; k + LANES <= length; k += LANES)
        put(to + k, widen(from + k * SIZE[dtype], dtype));
    if (k == length)
        return;
    char part[4 * LANES] = {0};
    memcpy(part, from + k * SIZE[dtype], (length - k) * SIZE[dtype]);
    put(to + k, widen(part, dtype));
    for (int64_t i = length; i < k + LANES; i++)
        to[i] = to[0]; /* which is no new maximum */
}

FN void line_out(char *to, int64_t length, const float *from, const int dtype)
{
    int64_t k = 0;
    char part[4 * LANES];
    for (; k + LANES <= length; k += LANES)
        narrow(to + k * SIZE[dtype], get(from + k), dtype);
    if (k < length) {
        narrow(part, get(from + k), dtype);
        memcpy(to + k * SIZE[dtype], part, (length - k) * SIZE[dtype]);
    }
}

/* Between a tensor and its tile, a line at a time: the classes of one row, or the pixels of one class. */
FN void copy(const Job *job, const Tensor *tensor, int64_t b, int64_t r, int64_t n, const Tile *tile, float *floats, int out)
{
    const int64_t lines = job->pixels ? job->classes : n, length = job->pixels ? n : job->classes;
    const int64_t far = job->pixels ? tensor->class_ : tensor->row, near = job->pixels ? tensor->row : tensor->class_;
    const int dtype = tensor->dtype, size = SIZE[dtype], gather = near != size && length > 1;
    char *data = tensor->data + b * tensor->batch + r * tensor->row;
    for (int64_t j = 0; j < lines; j++, data += far, floats += job->pixels ? tile->class_pitch : tile->row_pitch) {
        char *raw = gather ? tile->raw : data;
        if (!out && !job->pixels && !is_kept(job, b, r + j))
            continue;
        for (int64_t i = 0; job->pixels && !out && i < n * size; i += 64)
            PREFETCH(data + n * near + i); /* the next tile: too many streams for the processor to foresee */
        for (int64_t i = 0; gather && !out && i < length; i++)
            memcpy(raw + i * size, data + i * near, size);
#define LINE(dtype) out ? line_out(raw, length, floats, dtype) : line_in(raw, length, floats, dtype)
        dtype == FLOAT32 ? LINE(FLOAT32) : dtype == BFLOAT16 ? LINE(BFLOAT16) : LINE(FLOAT16);
#undef LINE
        for (int64_t i = 0; gather && out && i < length; i++)
            memcpy(data + i * near, raw + i * size, size);
    }
}

TARGET static void tiles(int64_t begin, int64_t end, void *context)
{
    Job *job = context;
    const int64_t row = job->pixels ? job->tile : (job->classes + LANES - 1) / LANES * LANES;
    const int64_t logits = row * (job->pixels ? job->classes : job->tile), in_batch = (job->rows + job->tile - 1) / job->tile;
    const int soft_target = job->target.dtype != INT64, kind = job->temperature == 1 ? 1 : job->temperature == 2 ? 2 : 0;
    float *scratch = malloc((4 * logits + row) * sizeof(float)); /* pages that are not touched cost nothing */
    if (!scratch) {
        job->out_of_memory = 1;
        return;
    }
    Tile tile = {{scratch, scratch + logits}, scratch + 2 * logits, scratch + 3 * logits, (char *)(scratch + 4 * logits),
                 row, 1, row / LANES, LANES, all_int(0), all_int(LANES)};
    for (int i = 0; i < LANES; i++)
        INT_LANE(tile.first, i) = i;
    if (job->pixels) {
        tile.row_pitch = 1, tile.class_pitch = tile.step = row, tile.steps = job->classes;
        tile.first = all_int(0), tile.next = all_int(1);
    }
    for (; begin < end; begin++) {
        const int64_t b = begin / in_batch, r = begin % in_batch * job->tile;
        const int64_t n = job->rows - r < job->tile ? job->rows - r : job->tile;
        copy(job, &job->student, b, r, n, &tile, tile.x[0], 0);
        copy(job, &job->teacher, b, r, n, &tile, tile.x[1], 0);
        if (soft_target)
            copy(job, &job->target, b, r, n, &tile, tile.target, 0);
        for (int64_t i = 0; i < n; i += LANES) {
#define CASE(kind, soft_target) case kind + 3 * soft_target: \
            rows_of(job, &tile, i * tile.row_pitch, b, r + i, n - i < LANES ? (int)(n - i) : LANES, kind, soft_target); break;
            switch (kind + 3 * soft_target) { CASE(0, 0) CASE(1, 0) CASE(2, 0) CASE(0, 1) CASE(1, 1) CASE(2, 1) }
#undef CASE
        }
        if (job->gradient.data)
            copy(job, &job->gradient, b, r, n, &tile, tile.x[0], 1);
    }
    free(scratch);
}
#undef MASK
#undef CONVERT
#undef HALVES
#undef ISA
#undef LANES
#undef TARGET
#endif

#ifndef MODULE
#define MODULE
#ifdef __GNUC__
#define FN static inline __attribute__((always_inline)) TARGET
#define NOINLINE static __attribute__((noinline)) TARGET
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define FN static __forceinline
#define NOINLINE static
#define PREFETCH(address) (void)(address)
#define restrict __restrict
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(BASELINE) /* its lanes, for tests */
#define DISPATCH
#define ISA avx512
#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#include "_rows.c"
#define ISA avx2
#define LANES 8
#define TARGET __attribute__((target("avx2,fma")))
#include "_rows.c"
#endif
#define ISA baseline
#ifdef BASELINE
#define LANES BASELINE
#elif defined(__GNUC__)
#define LANES 4
#else
#define LANES 1
#endif
#define TARGET
#include "_rows.c"

typedef void Work(int64_t begin, int64_t end, void *context);
typedef int32_t ParallelFor(int64_t begin, int64_t end, int64_t grain, Work *work, void *context);
static Work *chosen = tiles_baseline;

/* From an address, strides in elements of (B, C, R) or (B, R), and a dtype. */
static Tensor tensor_of(PyObject *const *arguments)
{
    Tensor tensor = {PyLong_AsVoidPtr(arguments[0]), 0, 0, 0, (int)PyLong_AsLong(arguments[2])};
    const Py_ssize_t dimensions = PyTuple_Size(arguments[1]);
    int64_t *strides[] = {&tensor.batch, dimensions == 3 ? &tensor.class_ : &tensor.row, &tensor.row};
    for (Py_ssize_t i = 0; i < dimensions; i++)
        *strides[i] = PyLong_AsLongLong(PyTuple_GetItem(arguments[1], i)) * SIZE[tensor.dtype];
    return tensor;
}

/* How many rows count in the mean, or -1 with an exception. */
static int64_t count(const Job *job)
{
    int64_t kept = 0;
    for (int64_t b = 0; b < job->batches; b++)
        for (int64_t r = 0; r < job->rows; r++) {
            if (!is_kept(job, b, r))
                continue;
            kept++;
            if (job->target.dtype == INT64 && (uint64_t)label_of(job, b, r) >= (uint64_t)job->classes) {
                PyErr_Format(PyExc_IndexError,
                             "target must hold class indices in [0, %lld) or ignore_index (%lld), got %lld",
                             (long long)job->classes, (long long)job->ignore_index, (long long)label_of(job, b, r));
                return -1;
            }
        }
    return kept;
}

static PyObject *run(PyObject *module, PyObject *const *arguments, Py_ssize_t size)
{
    if (size != 23)
        return PyErr_Format(PyExc_TypeError, "run takes 23 arguments, got %zd", size);
    ParallelFor *parallel_for = (ParallelFor *)PyLong_AsVoidPtr(arguments[0]);
    Job job;
    memset(&job, 0, sizeof job);
    job.batches = PyLong_AsLongLong(arguments[16]), job.classes = PyLong_AsLongLong(arguments[17]);
    job.rows = PyLong_AsLongLong(arguments[18]);
    job.student = tensor_of(arguments + 1), job.teacher = tensor_of(arguments + 4), job.target = tensor_of(arguments + 7);
    job.upstream = tensor_of(arguments + 10), job.gradient = tensor_of(arguments + 13);
    double option[4];
    for (int i = 0; i < 4; i++)
        option[i] = PyFloat_AsDouble(PyTuple_GetItem(arguments[19], i));
    job.temperature = (float)option[0], job.soft_weight = (float)(option[1] * option[0]);
    job.hard_weight = (float)option[2], job.smoothing = (float)option[3];
    job.ignore_index = PyLong_AsLongLong(PyTuple_GetItem(arguments[19], 4));
    const int mean = PyObject_IsTrue(arguments[20]);
    float *loss = PyLong_AsVoidPtr(arguments[22]); /* NULL: terms are asked for */
    job.out = PyLong_AsVoidPtr(arguments[21]), job.terms = !loss;
    const int64_t kept = PyErr_Occurred() ? -1 : count(&job);
    if (kept < 0)
        return NULL;
    job.scale = mean ? (float)(1.0 / (double)kept) : 1;

    job.pixels = job.rows > 1 && job.student.row == SIZE[job.student.dtype] && job.student.class_ != job.student.row;
    job.tile = job.pixels ? PIXELS_LOGITS / job.classes / ROWS * ROWS : ROWS_LOGITS / job.classes;
    const int64_t least = job.pixels ? ROWS : 1, most = job.pixels ? PIXELS : ROWS;
    job.tile = job.tile < least ? least : job.tile > most ? most : job.tile;
    const int64_t number = (job.rows + job.tile - 1) / job.tile * job.batches, grain = GRAIN / (job.tile * job.classes) + 1;
    Py_BEGIN_ALLOW_THREADS
    if (parallel_for && number > grain)
        parallel_for(0, number, grain, chosen, &job);
    else
        chosen(0, number, &job);
    Py_END_ALLOW_THREADS
    if (job.out_of_memory)
        return PyErr_NoMemory();

    double sum = 0;
    long long odd = 0;
    for (int64_t i = 0; i < job.batches * job.rows; i++)
        sum += job.out[i], odd += job.out[i] != job.out[i];
    if (loss)
        *loss = (float)(mean ? sum / (double)kept : sum);
    (void)module;
    return Py_BuildValue("LL", odd, (long long)kept);
}

static PyMethodDef methods[] = {{"run", (PyCFunction)(void (*)(void))run, METH_FASTCALL, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_rows", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__rows(void)
{
#ifdef DISPATCH
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        chosen = tiles_avx512;
    else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        chosen = tiles_avx2;
#endif
    return PyModule_Create(&definition);
}
#endif
