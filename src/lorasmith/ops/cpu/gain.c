#include <omp.h>
#include "vectors.h"

enum { WIDTH = 16 };

static inline __m512 floats(const float *x, int64_t n) { return _mm512_maskz_loadu_ps(first_16(n), x); }

/* out = y + gain (y - bias), by rows [rows, n] */
void gain_forward(const bf16 *y, const float *gain, const float *bias, bf16 *out, int64_t rows, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < n; j += WIDTH) {
            __m512 x = get(y + i * n + j, n - j), z = bias ? _mm512_sub_ps(x, floats(bias + j, n - j)) : x;
            put(_mm512_fmadd_ps(floats(gain + j, n - j), z, x), n - j, out + i * n + j);
        }
}

/* grad_y = grad + gain grad; total [n]: the sums over rows of grad (y - bias); 0 where memory ran out */
int gain_backward(const bf16 *grad, const bf16 *y, const float *gain, const float *bias, bf16 *grad_y, float *total,
                        int64_t rows, int64_t n, int threads) {
    float *sums = calloc((size_t)(threads * n), sizeof *sums);
    if (!sums) return 0;
#pragma omp parallel num_threads(threads)
    {
        float *own = sums + omp_get_thread_num() * n;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < n; j += WIDTH) {
                __m512 d = get(grad + i * n + j, n - j), x = get(y + i * n + j, n - j);
                __m512 z = bias ? _mm512_sub_ps(x, floats(bias + j, n - j)) : x;
                _mm512_mask_storeu_ps(own + j, first_16(n - j), _mm512_fmadd_ps(d, z, floats(own + j, n - j)));
                put(_mm512_fmadd_ps(floats(gain + j, n - j), d, d), n - j, grad_y + i * n + j);
            }
    }
    for (int64_t j = 0; j < n; j++) {
        float sum = 0;
        for (int t = 0; t < threads; t++) sum += sums[t * n + j];
        total[j] = sum;
    }
    free(sums);
    return 1;
}
