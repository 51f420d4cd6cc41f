/* The distance kernel with competition on the CPU, fused: see compiled.py for what calls it and kernels.py for the
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

/* Add one row's share of the factors' gradients: entry `index[s]` of K has the gradient `grad[s]`. */
static inline __attribute__((always_inline)) void accumulate(const Problem *a, int64_t row, int64_t h, int64_t count,
                                                             const int32_t *index, const float *grad,
                                                             const float *distance, int64_t columns, float *of_p,
                                                             float *of_q) {
    const float *p = a->p + (h * a->rows + row) * columns, *q = a->q + h * a->width * columns;
    float sign = h % 2 ? -a->scale : a->scale;
    for (int64_t s = 0; s < count; s++) {
        int64_t i = index[s];
        float weight = distance[i] == 0 ? 0 : sign * grad[s] / distance[i];
        const float *of_i = q + i * columns;
        float *into = of_q + i * columns;
        for (int64_t c = 0; c < columns; c++) {
            float part = weight * (p[c] - of_i[c]);
            of_p[c] += part;
            into[c] -= part;
        }
    }
}

/* Gradients of P (as P) and of Q (threads, as Q; zero at first) from `grad`, that of base + factor * update, without
 * the factor; then write base + factor * update over `grad` if `rewrite` is not 0. */
void snell_backward(const Problem *a, float tau, int64_t sparsifier, void *grad, int64_t grad_type, const void *base,
                    int64_t base_type, float factor, int64_t rewrite, float *grad_p, float *grad_q) {
    int64_t blocks = (a->rows + ROWS - 1) / ROWS, width = a->width;
#pragma omp parallel for num_threads(a->threads) schedule(static, 1)
    for (int t = 0; t < a->threads; t++) {
        float *of_block = a->scratch + t * a->room, *k = of_block + a->pieces * ROWS * a->stride, *scratch = k + width;
        float *result = scratch + width, *of_k = result + width;
        int32_t *index = (int32_t *)(of_k + width);
        for (int64_t b = blocks * t / a->threads; b < blocks * (t + 1) / a->threads; b++) {
            distances(a, b * ROWS, of_block);
            for (int r = 0; r < ROWS && b * ROWS + r < a->rows; r++) {
                int64_t row = b * ROWS + r, count = 0;
                combine(a, of_block, r, k);
                for (int32_t i = 0; i < width; i++) {
                    index[count] = i;
                    count += !(fabsf(k[i]) <= tau);
                }
                const float *of_row = load_row(grad, grad_type, row, width, scratch);
                for (int64_t s = 0; s < count; s++) {
                    int64_t i = index[s];
                    of_k[s] = slope_of(k[i], tau, sparsifier) * of_row[i];
                }
                for (int64_t h = 0; h < a->pieces; h++) {
                    float *of_p = grad_p + (h * a->rows + row) * a->columns;
                    float *of_q = grad_q + (t * a->pieces + h) * width * a->columns;
                    const float *distance = of_block + (h * ROWS + r) * a->stride;
                    /* The same loop with its length known, where that is a usual one. */
                    if (a->columns == 16) accumulate(a, row, h, count, index, of_k, distance, 16, of_p, of_q);
                    else if (a->columns == 8) accumulate(a, row, h, count, index, of_k, distance, 8, of_p, of_q);
                    else if (a->columns == 4) accumulate(a, row, h, count, index, of_k, distance, 4, of_p, of_q);
                    else accumulate(a, row, h, count, index, of_k, distance, a->columns, of_p, of_q);
                }
                if (!rewrite) continue;
                if (base) {
                    const float *of_base = load_row(base, base_type, row, width, scratch);
                    memcpy(result, of_base, width * sizeof(float));
                } else {
                    memset(result, 0, width * sizeof(float));
                }
                for (int64_t s = 0; s < count; s++)
                    result[index[s]] += factor * value_of(k[index[s]], tau, sparsifier);
                store_row(grad, grad_type, row, width, result);
            }
        }
    }
}
