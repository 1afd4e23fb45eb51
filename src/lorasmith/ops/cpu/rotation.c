#include <omp.h>
#include <string.h>
#include "vectors.h"

enum { WIDTH = 16, ROWS = 4 };

/* turn [n/s][s][s] -> [n/16][s][16]: what number i of a block is multiplied by, for 16 numbers of the result; and back */
static int64_t place(int64_t s, int64_t at, int is_transposed) {
    int64_t j = at / (WIDTH * s) * WIDTH + at % WIDTH, i = at / WIDTH % s, block = j / s;
    return is_transposed ? (block * s + j % s) * s + i : (block * s + i) * s + j % s;
}
static float *arranged(const float *turn, int64_t n, int64_t s, int is_transposed) {
    float *out = aligned_alloc(64, n * s * sizeof *out);
    for (int64_t at = 0; out && at < n * s; at++) out[at] = turn[place(s, at, is_transposed)];
    return out;
}

/* number i of each block of s, in all of the block's places */
static inline __m512 spread(__m512 x, __m512i first, int64_t i) {
    return _mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32((int)i)), x);
}
static inline __m512i first_of(int64_t s) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_and_epi32(lanes, _mm512_set1_epi32((int)-s));
}
static inline __m512 less(__m512 x, const float *bias, int64_t j) {
    return bias ? _mm512_sub_ps(x, _mm512_loadu_ps(bias + j)) : x;
}

static inline __attribute__((always_inline)) void rows_forward(const bf16 *y, const float *turn, const float *bias,
                                                               bf16 *out, const int rows, int64_t n, int64_t s) {
    const __m512i first = first_of(s);
    for (int64_t j = 0; j < n; j += WIDTH) {
        __m512 sums[ROWS], z[ROWS];
        for (int r = 0; r < rows; r++) z[r] = less(sums[r] = get(y + r * n + j, WIDTH), bias, j);
        for (int64_t i = 0; i < s; i++) {
            const __m512 by = _mm512_load_ps(turn + j * s + i * WIDTH);
            for (int r = 0; r < rows; r++) sums[r] = _mm512_fmadd_ps(spread(z[r], first, i), by, sums[r]);
        }
        for (int r = 0; r < rows; r++) put(sums[r], WIDTH, out + r * n + j);
    }
}

static inline __attribute__((always_inline)) void rows_backward(const bf16 *grad, const bf16 *y, const float *turned,
                                                                const float *bias, bf16 *grad_y, float *total,
                                                                const int rows, int64_t n, int64_t s) {
    const __m512i first = first_of(s);
    for (int64_t j = 0; j < n; j += WIDTH) {
        __m512 sums[ROWS], g[ROWS], z[ROWS];
        for (int r = 0; r < rows; r++) {
            sums[r] = g[r] = get(grad + r * n + j, WIDTH);
            z[r] = less(get(y + r * n + j, WIDTH), bias, j);
        }
        for (int64_t i = 0; i < s; i++) {
            float *to = total + j * s + i * WIDTH;
            const __m512 by = _mm512_load_ps(turned + j * s + i * WIDTH);
            __m512 sum = _mm512_load_ps(to);
            for (int r = 0; r < rows; r++) {
                sums[r] = _mm512_fmadd_ps(spread(g[r], first, i), by, sums[r]);
                sum = _mm512_fmadd_ps(spread(z[r], first, i), g[r], sum);
            }
            _mm512_store_ps(to, sum);
        }
        for (int r = 0; r < rows; r++) put(sums[r], WIDTH, grad_y + r * n + j);
    }
}

/* out = y + (y - bias) turn in blocks, by rows [rows, n]; s divides 16, and 16 n; 0 where memory ran out */
int rotation_forward(const bf16 *y, const float *turn, const float *bias, bf16 *out, int64_t rows, int64_t n, int64_t s,
                     int threads) {
    float *by = arranged(turn, n, s, 0);
    if (!by) return 0;
    const int64_t whole = rows / ROWS * ROWS;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < whole; i += ROWS) rows_forward(y + i * n, by, bias, out + i * n, ROWS, n, s);
#pragma omp for schedule(static)
        for (int64_t i = whole; i < rows; i++) rows_forward(y + i * n, by, bias, out + i * n, 1, n, s);
    }
    free(by);
    return 1;
}

/* grad_y = grad + grad turn^T in blocks; grad_turn: the sums over rows of (y - bias) times grad, in blocks */
int rotation_backward(const bf16 *grad, const bf16 *y, const float *turn, const float *bias, bf16 *grad_y,
                      float *grad_turn, int64_t rows, int64_t n, int64_t s, int threads) {
    float *by = arranged(turn, n, s, 1), *sums = aligned_alloc(64, threads * n * s * sizeof *sums);
    const int64_t whole = rows / ROWS * ROWS;
    int ok = by && sums;
    if (ok) {
        memset(sums, 0, threads * n * s * sizeof *sums); /* there may be fewer threads than asked for */
#pragma omp parallel num_threads(threads)
        {
            float *own = sums + omp_get_thread_num() * n * s;
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < whole; i += ROWS)
                rows_backward(grad + i * n, y + i * n, by, bias, grad_y + i * n, own, ROWS, n, s);
#pragma omp for schedule(static)
            for (int64_t i = whole; i < rows; i++)
                rows_backward(grad + i * n, y + i * n, by, bias, grad_y + i * n, own, 1, n, s);
        }
        for (int64_t at = 0; at < n * s; at++) {
            float sum = 0;
            for (int t = 0; t < threads; t++) sum += sums[t * n * s + at];
            grad_turn[place(s, at, 0)] = sum;
        }
    }
    free(by); free(sums);
    return ok;
}
