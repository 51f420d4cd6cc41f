/* The distance kernel with competition on the CPU, fused: see loop.py for what calls it and kernels.py for the
 * mathematics.
 *
 * Matrices are row-major. P is (pieces, rows, columns), Q (pieces, width, columns), and Q again as QT (pieces, columns,
 * stride), whose rows are padded with zeros to a multiple of BLOCK. Work is split into `threads` ranges of rows, each with
 * `room` floats of scratch: (pieces * ROWS * stride + 5 * width). The matrix K is always made by `distances` and
 * `combine`, so forward and backward see the same bits.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define BLOCK (2 * LANES)
#define ROWS 4

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

enum { MAGNITUDE, SOFT, HARD };
enum { FLOAT32, BFLOAT16 };

typedef struct {
    const float *p, *q, *qt;
    float *scratch; /* (threads, room) */
    int64_t pieces, rows, width, columns, stride, room;
    float scale;
    int threads;
} Problem;

static inline float value_of(float k, float tau, int64_t sparsifier) {
    if (sparsifier == MAGNITUDE) return k * fabsf(k);
    if (sparsifier == SOFT) return k * (fabsf(k) - tau);
    return k;
}

static inline float slope_of(float k, float tau, int64_t sparsifier) {
    if (sparsifier == MAGNITUDE) return fabsf(k);
    if (sparsifier == SOFT) return 2 * fabsf(k) - tau;
    return 1;
}

/* A row of a matrix of either type, as floats; `scratch` is used where it has to be converted. */
static const float *load_row(const void *matrix, int64_t type, int64_t row, int64_t width, float *scratch) {
    if (type == FLOAT32) return (const float *)matrix + row * width;
    const uint16_t *halves = (const uint16_t *)matrix + row * width;
    for (int64_t i = 0; i < width; i++) {
        uint32_t bits = (uint32_t)halves[i] << 16;
        memcpy(scratch + i, &bits, 4);
    }
    return scratch;
}

/* Rounds to nearest even, as torch does. */
static void store_row(void *matrix, int64_t type, int64_t row, int64_t width, const float *values) {
    if (type == FLOAT32) {
        memcpy((float *)matrix + row * width, values, width * sizeof(float));
        return;
    }
    uint16_t *halves = (uint16_t *)matrix + row * width;
    for (int64_t i = 0; i < width; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, 4);
        uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        halves[i] = values[i] != values[i] ? 0x7fc0 : (uint16_t)rounded;
    }
}

/* Distances of ROWS rows from `first` on to all of Q, for each piece: out (pieces, ROWS, stride). Past the last row,
 * that one is repeated. */
static void distances(const Problem *a, int64_t first, float *out) {
    for (int64_t h = 0; h < a->pieces; h++) {
        const float *p[ROWS], *qt = a->qt + h * a->columns * a->stride;
        for (int r = 0; r < ROWS; r++) {
            int64_t row = first + r < a->rows ? first + r : a->rows - 1;
            p[r] = a->p + (h * a->rows + row) * a->columns;
        }
        float *of_piece = out + h * ROWS * a->stride;
        for (int64_t i = 0; i < a->stride; i += BLOCK) {
            vec sums[ROWS][2];
            memset(sums, 0, sizeof sums);
            for (int64_t c = 0; c < a->columns; c++) {
                vec left = *(const vec *)(qt + c * a->stride + i), right = *(const vec *)(qt + c * a->stride + i + LANES);
                for (int r = 0; r < ROWS; r++) {
                    vec x = left - p[r][c], y = right - p[r][c];
                    sums[r][0] += x * x;
                    sums[r][1] += y * y;
                }
            }
            for (int r = 0; r < ROWS; r++) {
                float *target = of_piece + r * a->stride + i;
                *(vec *)target = sums[r][0];
                *(vec *)(target + LANES) = sums[r][1];
                for (int l = 0; l < BLOCK; l++) target[l] = sqrtf(target[l]);
            }
        }
    }
}

/* One row of K from the distances of its block. */
static void combine(const Problem *a, const float *of_block, int r, float *k) {
    const float *first = of_block + r * a->stride;
    if (a->pieces == 1) {
        for (int64_t i = 0; i < a->width; i++) k[i] = a->scale * first[i];
        return;
    }
    const float *second = of_block + (ROWS + r) * a->stride;
    for (int64_t i = 0; i < a->width; i++) k[i] = a->scale * (first[i] - second[i]);
    for (int64_t h = 2; h < a->pieces; h++) {
        const float *more = of_block + (h * ROWS + r) * a->stride;
        float factor = h % 2 ? -a->scale : a->scale;
        for (int64_t i = 0; i < a->width; i++) k[i] += factor * more[i];
    }
}

/* |K| at the entries 0, step, 2 step, ... */
void snell_sample(const Problem *a, int64_t step, int64_t count, float *out) {
    for (int64_t s = 0; s < count; s++) {
        int64_t row = s * step / a->width, i = s * step % a->width;
        float k = 0;
        for (int64_t h = 0; h < a->pieces; h++) {
            const float *p = a->p + (h * a->rows + row) * a->columns, *q = a->q + (h * a->width + i) * a->columns;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t c = 0; c < a->columns; c++) sum += (p[c] - q[c]) * (p[c] - q[c]);
            k += (h % 2 ? -a->scale : a->scale) * sqrtf(sum);
        }
        out[s] = fabsf(k);
    }
}

/* Write K. Of each range of rows, count what lies below `low` by absolute value, and keep what lies between `low` and
 * `high` in `candidates (threads, capacity)`; `counts (threads, 2)` says how many of both, -1 where the capacity did not
 * suffice. Without capacity, nothing is counted. */
void snell_fill(const Problem *a, float *out, float low, float high, float *candidates, int64_t capacity,
                int64_t *counts) {
    int64_t blocks = (a->rows + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(a->threads) schedule(static, 1)
    for (int t = 0; t < a->threads; t++) {
        float *of_block = a->scratch + t * a->room, *kept = candidates + t * capacity;
        int64_t below = 0, inside = 0;
        for (int64_t b = blocks * t / a->threads; b < blocks * (t + 1) / a->threads; b++) {
            distances(a, b * ROWS, of_block);
            for (int r = 0; r < ROWS && b * ROWS + r < a->rows; r++) {
                float *k = out + (b * ROWS + r) * a->width;
                combine(a, of_block, r, k);
                if (!capacity || inside < 0) continue;
                if (inside + a->width > capacity) {
                    inside = -1;
                    continue;
                }
                int32_t less = 0;
                for (int64_t i = 0; i < a->width; i++) less += fabsf(k[i]) < low;
                below += less;
                for (int64_t i = 0; i < a->width; i++) {
                    float size = fabsf(k[i]);
                    kept[inside] = size;
                    inside += size >= low && size <= high;
                }
            }
        }
        counts[2 * t] = below;
        counts[2 * t + 1] = inside;
    }
}

/* Turn K into base + factor * update, in place. */
void snell_finish(const Problem *a, float *matrix, float tau, int64_t sparsifier, const void *base, int64_t base_type,
                  float factor) {
    int64_t rows = a->rows, width = a->width;
#pragma omp parallel for num_threads(a->threads) schedule(static, 1)
    for (int t = 0; t < a->threads; t++) {
        float *scratch = a->scratch + t * a->room;
        for (int64_t row = rows * t / a->threads; row < rows * (t + 1) / a->threads; row++) {
            float *k = matrix + row * width;
#define FINISH(OF_BASE, SPARSIFIER)                                                                                   \
    for (int64_t i = 0; i < width; i++)                                                                               \
        k[i] = OF_BASE + (fabsf(k[i]) <= tau ? 0.0f : factor * value_of(k[i], tau, SPARSIFIER));
            if (base) {
                const float *of_base = load_row(base, base_type, row, width, scratch);
                if (sparsifier == MAGNITUDE) FINISH(of_base[i], MAGNITUDE)
                else if (sparsifier == SOFT) FINISH(of_base[i], SOFT)
                else FINISH(of_base[i], HARD)
            } else {
                if (sparsifier == MAGNITUDE) FINISH(0, MAGNITUDE)
                else if (sparsifier == SOFT) FINISH(0, SOFT)
                else FINISH(0, HARD)
            }
        }
    }
}

/* Add one row's share of one piece to the factors' gradients: entry `index[s]` of K has the gradient `of_k[s]`. Distances
 * are made anew: few entries need one. `weights` has room for one number per entry. */
static inline __attribute__((always_inline)) void accumulate(const Problem *a, int64_t row, int64_t h, int64_t count,
                                                             const int32_t *restrict index, const float *restrict of_k,
                                                             float *restrict weights, int64_t columns,
                                                             float *restrict of_p, float *restrict of_q) {
    const float *restrict p = a->p + (h * a->rows + row) * columns, *restrict q = a->q + h * a->width * columns;
    float sign = h % 2 ? -a->scale : a->scale;
    for (int64_t s = 0; s < count; s++) {
        const float *of_i = q + index[s] * columns;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < columns; c++) sum += (p[c] - of_i[c]) * (p[c] - of_i[c]);
        weights[s] = sum;
    }
    for (int64_t s = 0; s < count; s++) weights[s] = weights[s] == 0 ? 0 : sign * of_k[s] / sqrtf(weights[s]);
    for (int64_t s = 0; s < count; s++) {
        const float *of_i = q + index[s] * columns;
        float *into = of_q + index[s] * columns;
        for (int64_t c = 0; c < columns; c++) {
            float part = weights[s] * (p[c] - of_i[c]);
            of_p[c] += part;
            into[c] -= part;
        }
    }
}

static void accumulate_row(const Problem *a, int64_t row, int t, int64_t count, const int32_t *index, const float *of_k,
                           float *weights, float *grad_p, float *grad_q) {
    for (int64_t h = 0; h < a->pieces; h++) {
        float *of_p = grad_p + (h * a->rows + row) * a->columns;
        float *of_q = grad_q + (t * a->pieces + h) * a->width * a->columns;
        /* The same loop with its length known, where that is a usual one. */
        if (a->columns == 16) accumulate(a, row, h, count, index, of_k, weights, 16, of_p, of_q);
        else if (a->columns == 8) accumulate(a, row, h, count, index, of_k, weights, 8, of_p, of_q);
        else if (a->columns == 4) accumulate(a, row, h, count, index, of_k, weights, 4, of_p, of_q);
        else accumulate(a, row, h, count, index, of_k, weights, a->columns, of_p, of_q);
    }
}

/* Write a row of base + factor * update, whose entries `index` of K are `k`. */
static void put_row(const Problem *a, int64_t row, float tau, int64_t sparsifier, int64_t count, const int32_t *index,
                    const float *k, const void *base, int64_t base_type, float factor, float *scratch, void *out,
                    int64_t out_type) {
    if (base) {
        const float *of_base = load_row(base, base_type, row, a->width, scratch);
        if (of_base != scratch) memcpy(scratch, of_base, a->width * sizeof(float));
    } else {
        memset(scratch, 0, a->width * sizeof(float));
    }
    for (int64_t s = 0; s < count; s++) scratch[index[s]] += factor * value_of(k[s], tau, sparsifier);
    store_row(out, out_type, row, a->width, scratch);
}

/* The survivors of a row of K: where they are and what they are. Both lists have room for the whole row. */
static int64_t survivors(const float *k, int64_t width, float tau, int32_t *index, float *values) {
    int64_t count = 0;
    for (int32_t i = 0; i < width; i++) {
        index[count] = i;
        values[count] = k[i];
        count += !(fabsf(k[i]) <= tau);
    }
    return count;
}

/* Gradients of P (as P) and of Q (threads, as Q), both zero at first, from `grad`, that of base + factor * update,
 * without the factor; then write base + factor * update over `grad` if `rewrite` is not 0. */
void snell_backward(const Problem *a, float tau, int64_t sparsifier, void *grad, int64_t grad_type, const void *base,
                    int64_t base_type, float factor, int64_t rewrite, float *grad_p, float *grad_q) {
    int64_t blocks = (a->rows + ROWS - 1) / ROWS, width = a->width;
#pragma omp parallel for num_threads(a->threads) schedule(static, 1)
    for (int t = 0; t < a->threads; t++) {
        float *of_block = a->scratch + t * a->room, *k = of_block + a->pieces * ROWS * a->stride;
        float *row_scratch = k + width, *values = row_scratch + width, *of_k = values + width;
        int32_t *index = (int32_t *)(of_k + width);
        for (int64_t b = blocks * t / a->threads; b < blocks * (t + 1) / a->threads; b++) {
            distances(a, b * ROWS, of_block);
            for (int r = 0; r < ROWS && b * ROWS + r < a->rows; r++) {
                int64_t row = b * ROWS + r;
                combine(a, of_block, r, k);
                int64_t count = survivors(k, width, tau, index, values);
                const float *of_row = load_row(grad, grad_type, row, width, row_scratch);
                for (int64_t s = 0; s < count; s++)
                    of_k[s] = slope_of(values[s], tau, sparsifier) * of_row[index[s]];
                accumulate_row(a, row, t, count, index, of_k, row_scratch, grad_p, grad_q);
                if (rewrite)
                    put_row(a, row, tau, sparsifier, count, index, values, base, base_type, factor, row_scratch, grad,
                            grad_type);
            }
        }
    }
}

static inline float total_of(vec v) {
    float lanes[LANES], total = 0;
    memcpy(lanes, &v, sizeof lanes);
#pragma omp simd reduction(+ : total)
    for (int l = 0; l < LANES; l++) total += lanes[l];
    return total;
}

/* `count` sums over `length` (a multiple of LANES) products of one row with the rows `index` of a matrix. */
static void add_products(const float *row, const float *matrix, int64_t stride, int64_t length, const int32_t *index,
                         int64_t count, float *sums) {
    int64_t s = 0;
    for (; s + 4 <= count; s += 4) {
        const float *first = matrix + index[s] * stride, *second = matrix + index[s + 1] * stride;
        const float *third = matrix + index[s + 2] * stride, *fourth = matrix + index[s + 3] * stride;
        vec a = {0}, b = {0}, c = {0}, d = {0};
        for (int64_t j = 0; j < length; j += LANES) {
            vec x = *(const vec *)(row + j);
            a += x * *(const vec *)(first + j);
            b += x * *(const vec *)(second + j);
            c += x * *(const vec *)(third + j);
            d += x * *(const vec *)(fourth + j);
        }
        sums[s] += total_of(a);
        sums[s + 1] += total_of(b);
        sums[s + 2] += total_of(c);
        sums[s + 3] += total_of(d);
    }
    for (; s < count; s++) {
        const float *of_s = matrix + index[s] * stride;
        vec a = {0};
        for (int64_t j = 0; j < length; j += LANES) a += *(const vec *)(row + j) * *(const vec *)(of_s + j);
        sums[s] += total_of(a);
    }
}

/* Columns `first` to `last` of the rows `tokens` of a matrix, transposed, with zeros up to `length` columns. */
static void turn(const void *matrix, int64_t type, int64_t matrix_stride, const int64_t *tokens, int64_t count,
                 int64_t first, int64_t last, float *out, int64_t out_stride, int64_t length) {
    for (int64_t i = first; i < last; i += LANES) {
        int64_t lanes = last - i < LANES ? last - i : LANES;
        float *into = out + (i - first) * out_stride;
        for (int64_t t = 0; t < count; t++) {
            int64_t start = tokens[t] * matrix_stride + i;
            if (type == FLOAT32) {
                const float *from = (const float *)matrix + start;
                for (int64_t l = 0; l < lanes; l++) into[l * out_stride + t] = from[l];
            } else {
                const uint16_t *from = (const uint16_t *)matrix + start;
                for (int64_t l = 0; l < lanes; l++) {
                    uint32_t bits = (uint32_t)from[l] << 16;
                    memcpy(into + l * out_stride + t, &bits, 4);
                }
            }
        }
        for (int64_t t = count; t < length; t++)
            for (int64_t l = 0; l < lanes; l++) into[l * out_stride + t] = 0;
    }
}

/* As snell_backward, where the gradient of base + factor * update is grad_y^T x over the rows `tokens` of both, made for
 * the survivors only; base + factor * update is written to `out` unless that is null. Per survivor `index`, `values` and
 * `of_k` hold an entry, `capacity` in all; `starts` and `counts` have one per row. `turned (width, chunk + LANES)` holds
 * some tokens of x transposed, `turned_y (threads, LANES, chunk)` of grad_y. `used` is 0 at first; past the capacity it
 * tells so at the end, and nothing else was done. */
void snell_sampled(const Problem *a, float tau, int64_t sparsifier, const void *grad_y, int64_t stride_y, const void *x,
                   int64_t stride_x, int64_t type, const int64_t *tokens, int64_t token_count, int64_t chunk,
                   int32_t *index, float *values, float *of_k, int64_t capacity, int64_t *starts, int64_t *counts,
                   float *turned, float *turned_y, int64_t *used, void *out, int64_t out_type, const void *base,
                   int64_t base_type, float factor, float *grad_p, float *grad_q) {
    int64_t blocks = (a->rows + ROWS - 1) / ROWS, width = a->width, turned_stride = chunk + LANES, threads = a->threads;
#pragma omp parallel for num_threads(a->threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        float *of_block = a->scratch + t * a->room, *k = of_block + a->pieces * ROWS * a->stride, *of_row = k + width;
        int32_t *index_of_row = (int32_t *)(of_row + width);
        for (int64_t b = blocks * t / threads; b < blocks * (t + 1) / threads; b++) {
            distances(a, b * ROWS, of_block);
            for (int r = 0; r < ROWS && b * ROWS + r < a->rows; r++) {
                combine(a, of_block, r, k);
                int64_t count = survivors(k, width, tau, index_of_row, of_row), start;
                start = __atomic_fetch_add(used, count, __ATOMIC_RELAXED);
                if (start + count > capacity) continue;
                starts[b * ROWS + r] = start;
                counts[b * ROWS + r] = count;
                memcpy(index + start, index_of_row, count * sizeof(int32_t));
                memcpy(values + start, of_row, count * sizeof(float));
                memset(of_k + start, 0, count * sizeof(float));
            }
        }
    }
    if (*used > capacity) return;
    for (int64_t first = 0; first < token_count; first += chunk) {
        int64_t count = token_count - first < chunk ? token_count - first : chunk;
        int64_t length = (count + LANES - 1) / LANES * LANES, groups = (a->rows + LANES - 1) / LANES;
#pragma omp parallel for num_threads(a->threads) schedule(static, 1)
        for (int t = 0; t < threads; t++) {
            int64_t low = width * t / threads, high = width * (t + 1) / threads;
            turn(x, type, stride_x, tokens + first, count, low, high, turned + low * turned_stride, turned_stride, length);
        }
#pragma omp parallel for num_threads(a->threads) schedule(static, 1)
        for (int t = 0; t < threads; t++) {
            float *of_y = turned_y + t * LANES * chunk;
            for (int64_t g = groups * t / threads; g < groups * (t + 1) / threads; g++) {
                int64_t low = g * LANES, high = low + LANES < a->rows ? low + LANES : a->rows;
                turn(grad_y, type, stride_y, tokens + first, count, low, high, of_y, chunk, length);
                for (int64_t row = low; row < high; row++)
                    add_products(of_y + (row - low) * chunk, turned, turned_stride, length, index + starts[row],
                                 counts[row], of_k + starts[row]);
            }
        }
    }
#pragma omp parallel for num_threads(a->threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        for (int64_t row = a->rows * t / threads; row < a->rows * (t + 1) / threads; row++) {
            int64_t start = starts[row], count = counts[row];
            for (int64_t s = start; s < start + count; s++) of_k[s] *= slope_of(values[s], tau, sparsifier);
            accumulate_row(a, row, t, count, index + start, of_k + start, a->scratch + t * a->room, grad_p, grad_q);
            if (out)
                put_row(a, row, tau, sparsifier, count, index + start, values + start, base, base_type, factor,
                        a->scratch + t * a->room, out, out_type);
        }
    }
}
