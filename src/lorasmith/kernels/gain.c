#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <omp.h>

typedef uint16_t bf16;
enum { WIDTH = 16 };

static inline __m512 widened(__mmask16 mask, const bf16 *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}
static inline void narrowed(bf16 *out, __mmask16 mask, __m512 x) {
    _mm256_mask_storeu_epi16(out, mask, (__m256i)_mm512_cvtneps_pbh(x));
}
static inline __mmask16 rest(int64_t n) { return n >= WIDTH ? 0xffff : (1 << n) - 1; }

/* out = y + gain (y - bias), by rows [rows, n] */
void gain_forward(const bf16 *y, const float *gain, const float *bias, bf16 *out, int64_t rows, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < n; j += WIDTH) {
            __mmask16 mask = rest(n - j);
            __m512 x = widened(mask, y + i * n + j), g = _mm512_maskz_loadu_ps(mask, gain + j);
            __m512 z = bias ? _mm512_sub_ps(x, _mm512_maskz_loadu_ps(mask, bias + j)) : x;
            narrowed(out + i * n + j, mask, _mm512_fmadd_ps(g, z, x));
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
                __mmask16 mask = rest(n - j);
                __m512 d = widened(mask, grad + i * n + j), x = widened(mask, y + i * n + j);
                __m512 g = _mm512_maskz_loadu_ps(mask, gain + j);
                __m512 z = bias ? _mm512_sub_ps(x, _mm512_maskz_loadu_ps(mask, bias + j)) : x;
                _mm512_mask_storeu_ps(own + j, mask, _mm512_fmadd_ps(d, z, _mm512_maskz_loadu_ps(mask, own + j)));
                narrowed(grad_y + i * n + j, mask, _mm512_fmadd_ps(g, d, d));
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
