#include <omp.h>
#include "vectors.h"

enum { WIDTH = 16, MOST = 128 };

/* out [r s, n]: the products of all pairs of rows of a [r, n] and b [s, n] */
void pairs_forward(const bf16 *a, const bf16 *b, bf16 *out, int64_t r, int64_t s, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t at = 0; at < r * s; at++)
        for (int64_t j = 0; j < n; j += WIDTH)
            put(_mm512_mul_ps(get(a + at / s * n + j, n - j), get(b + at % s * n + j, n - j)), n - j, out + at * n + j);
}

/* the gradients of a and b, given that of the products; s is MOST at most */
void pairs_backward(const bf16 *grad, const bf16 *a, const bf16 *b, bf16 *grad_a, bf16 *grad_b, int64_t r, int64_t s,
                    int64_t n, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t j = 0; j < n; j += WIDTH) {
        __m512 sums[MOST], others[MOST];
        for (int64_t q = 0; q < s; q++) {
            sums[q] = _mm512_setzero_ps();
            others[q] = get(b + q * n + j, n - j);
        }
        for (int64_t p = 0; p < r; p++) {
            __m512 sum = _mm512_setzero_ps(), x = get(a + p * n + j, n - j);
            for (int64_t q = 0; q < s; q++) {
                __m512 g = get(grad + (p * s + q) * n + j, n - j);
                sum = _mm512_fmadd_ps(g, others[q], sum);
                sums[q] = _mm512_fmadd_ps(g, x, sums[q]);
            }
            put(sum, n - j, grad_a + p * n + j);
        }
        for (int64_t q = 0; q < s; q++) put(sums[q], n - j, grad_b + q * n + j);
    }
}
