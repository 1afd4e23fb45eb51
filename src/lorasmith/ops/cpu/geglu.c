/* h * gelu(g) for rows [h, g] of bf16, and its gradient, computed in fp32. */
#include "vectors.h"

/* the normal distribution of 16 numbers and its density; Abramowitz and Stegun 1964, 7.1.26: within 1e-7 */
static inline __m512 distribution(__m512 x, __m512 *density) {
    const __m512 one = _mm512_set1_ps(1);
    __m512 e = exp2_of(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.5f * LOG2_E)));
    __m512 size = _mm512_min_ps(_mm512_abs_ps(x), _mm512_set1_ps(100));  /* e is 0 there; infinity would give NaN */
    __m512 d = _mm512_fmadd_ps(size, _mm512_set1_ps(0.3275911f * 0.707106781f), one);
    __m512 t = _mm512_rcp14_ps(d);
    t = _mm512_mul_ps(t, _mm512_fnmadd_ps(d, t, _mm512_set1_ps(2)));  /* a step of Newton's */
    __m512 p = _mm512_set1_ps(0.5f * 1.061405429f);
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f * -1.453152027f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f * 1.421413741f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f * -0.284496736f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f * 0.254829592f));
    p = _mm512_mul_ps(_mm512_mul_ps(p, t), e);
    *density = _mm512_mul_ps(e, _mm512_set1_ps(0.39894228f));
    return _mm512_mask_sub_ps(p, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), one, p);
}

/* x [rows, 2 n] -> y [rows, n] */
void geglu_forward(const bf16 *x, bf16 *y, int64_t rows, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const bf16 *h = x + r * 2 * n, *g = h + n;
        for (int64_t c = 0; c < n; c += 16) {
            __m512 gate = get(g + c, n - c), density, share = distribution(gate, &density);
            put(_mm512_mul_ps(get(h + c, n - c), _mm512_mul_ps(gate, share)), n - c, y + r * n + c);
        }
    }
}

/* x [rows, 2 n] and the gradient of y [rows, n] -> the gradient of x */
void geglu_backward(const bf16 *x, const bf16 *dy, bf16 *dx, int64_t rows, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const bf16 *h = x + r * 2 * n, *g = h + n;
        bf16 *dh = dx + r * 2 * n, *dg = dh + n;
        for (int64_t c = 0; c < n; c += 16) {
            __m512 gate = get(g + c, n - c), density, share = distribution(gate, &density);
            __m512 grad = get(dy + r * n + c, n - c), slope = _mm512_fmadd_ps(gate, density, share);
            put(_mm512_mul_ps(grad, _mm512_mul_ps(gate, share)), n - c, dh + c);
            put(_mm512_mul_ps(_mm512_mul_ps(grad, get(h + c, n - c)), slope), n - c, dg + c);
        }
    }
}
