/* Group normalisation (Wu and He 2018) of pictures in bf16 whose channels lie close, with or without SiLU behind it, and
   its gradient. */
#include "vectors.h"
#include <math.h>
#include <string.h>

enum { ROWS = 8 };  /* whose sums stay in registers */

/* what a norm makes of x before SiLU: for each channel a factor and a summand */
typedef struct { const float *by, *plus; } Normal;

static inline __m512 normal(Normal n, const bf16 *x, int64_t c, int64_t channels) {
    return _mm512_fmadd_ps(get(x + c, channels - c), _mm512_load_ps(n.by + c), _mm512_load_ps(n.plus + c));
}
static inline __m512 sigmoid(__m512 z) {
    const __m512 one = _mm512_set1_ps(1);
    return _mm512_div_ps(one, _mm512_add_ps(one, exp2_of(_mm512_mul_ps(z, _mm512_set1_ps(-LOG2_E)))));
}
/* the gradient of what stands before SiLU: g itself where there is none */
static inline __m512 before(Normal n, const bf16 *x, const bf16 *g, int64_t c, int64_t channels) {
    __m512 grad = get(g + c, channels - c);
    if (!n.by) return grad;
    const __m512 one = _mm512_set1_ps(1);
    __m512 z = normal(n, x, c, channels), s = sigmoid(z);
    return _mm512_mul_ps(grad, _mm512_mul_ps(s, _mm512_fmadd_ps(z, _mm512_sub_ps(one, s), one)));
}

/* for each channel: sums += the sum of g over rows, and products += that of g x */
static void add_sums(const bf16 *x, const bf16 *g, int64_t rows, int64_t channels, Normal n, float *sums,
                     float *products) {
    for (int64_t r = 0; r < rows; r += ROWS)
        for (int64_t c = 0; c < channels; c += 16) {
            __m512 sum = _mm512_load_ps(sums + c), product = _mm512_load_ps(products + c);
            for (int64_t i = r; i < least(rows, r + ROWS); i++) {
                __m512 a = before(n, x + i * channels, g + i * channels, c, channels);
                sum = _mm512_add_ps(sum, a);
                product = _mm512_fmadd_ps(a, get(x + i * channels + c, channels - c), product);
            }
            _mm512_store_ps(sums + c, sum);
            _mm512_store_ps(products + c, product);
        }
}

/* y = by_g g + by_x x + plus, with a factor each and a summand for each channel */
static void mix(const bf16 *x, const bf16 *g, int64_t rows, int64_t channels, Normal n, const float *by_g,
                const float *by_x, const float *plus, bf16 *y) {
    for (int64_t r = 0; r < rows; r++, x += channels, g += channels, y += channels)
        for (int64_t c = 0; c < channels; c += 16) {
            __m512 sum = _mm512_fmadd_ps(get(x + c, channels - c), _mm512_load_ps(by_x + c), _mm512_load_ps(plus + c));
            put(_mm512_fmadd_ps(before(n, x, g, c, channels), _mm512_load_ps(by_g + c), sum), channels - c, y + c);
        }
}
/* y = SiLU of the norm of x */
static void activate(const bf16 *x, int64_t rows, int64_t channels, Normal n, bf16 *y) {
    for (int64_t r = 0; r < rows; r++, x += channels, y += channels)
        for (int64_t c = 0; c < channels; c += 16) {
            __m512 z = normal(n, x, c, channels);
            put(_mm512_mul_ps(z, sigmoid(z)), channels - c, y + c);
        }
}

static inline float one(const bf16 *x) { return _mm512_cvtss_f32(get(x, 1)); }

typedef struct { const bf16 *weight, *bias; float *mean, *rstd; float eps; } Norm;

/* The factors and summands of mix() from sums over count = pixels x channels of a group: forward, where g is x. */
static void factors_forward(Norm n, int64_t start, int64_t end, double count, const float *sums, const float *products,
                            float *by_g, float *by_x, float *plus) {
    double sum = 0, square = 0;
    for (int64_t c = start; c < end; c++) { sum += sums[c]; square += products[c]; }
    double mean = sum / count, variance = square / count - mean * mean;
    double rstd = 1 / sqrt((variance < 0 ? 0 : variance) + n.eps);
    *n.mean = mean; *n.rstd = rstd;
    for (int64_t c = start; c < end; c++) {
        by_g[c] = one(n.weight + c) * rstd; by_x[c] = 0;
        plus[c] = one(n.bias + c) - mean * by_g[c];
    }
}
/* backward: dx = rstd (w g - mean(w g) - x' mean(w g x')), x' = (x - mean) rstd */
static void factors_backward(Norm n, int64_t start, int64_t end, double count, const float *sums, const float *products,
                             float *by_g, float *by_x, float *plus) {
    double sum = 0, product = 0, mean = *n.mean, rstd = *n.rstd;
    for (int64_t c = start; c < end; c++) {
        sum += one(n.weight + c) * sums[c];
        product += one(n.weight + c) * products[c];
    }
    double slope = -(product - mean * sum) * rstd * rstd * rstd / count;
    for (int64_t c = start; c < end; c++) {
        by_g[c] = one(n.weight + c) * rstd; by_x[c] = slope;
        plus[c] = -mean * slope - rstd * sum / count;
    }
}

/* the factors and summands of Normal, of the groups whose means and deviations are known */
static void normal_of(Norm n, int64_t channels, int64_t size, float *by, float *plus) {
    for (int64_t c = 0; c < channels; c++) {
        by[c] = one(n.weight + c) * n.rstd[c / size];
        plus[c] = one(n.bias + c) - n.mean[c / size] * by[c];
    }
}

/* x [B, pixels, C] and the gradient g of y or, forward, x again -> the gradient of x or, forward, y; mean and rstd
   [B, groups]; 0 where memory ran out */
int group_norm(const bf16 *x, const bf16 *g, const bf16 *weight, const bf16 *bias, float *mean, float *rstd, bf16 *y,
               int64_t batch, int64_t pixels, int64_t channels, int64_t groups, float eps, int is_forward,
               int has_silu, int threads) {
    int64_t width = up_to(channels, 16), part = (pixels + threads - 1) / threads, size = channels / groups;
    float *space = aligned_alloc(64, (2 * threads + 5) * width * 4);
    float *by_g = space + 2 * threads * width, *by_x = by_g + width, *plus = by_x + width, *by = plus + width;
    const Normal none = {0, 0};
    if (!space) return 0;
    for (int64_t b = 0; b < batch; b++, x += pixels * channels, g += pixels * channels, y += pixels * channels) {
        memset(space, 0, (2 * threads + 5) * width * 4);
        Norm all = {weight, bias, mean + b * groups, rstd + b * groups, eps};
        if (has_silu && !is_forward) normal_of(all, channels, size, by, by + width);
        const Normal behind = has_silu && !is_forward ? (Normal){by, by + width} : none;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int64_t t = 0; t < threads; t++) {
            int64_t start = least(t * part, pixels), end = least(start + part, pixels);
            float *sums = space + 2 * t * width;
            add_sums(x + start * channels, g + start * channels, end - start, channels, behind, sums, sums + width);
        }
        for (int64_t i = 2 * width; i < 2 * threads * width; i++) space[i % (2 * width)] += space[i];
        for (int64_t i = 0; i < groups; i++) {
            Norm norm = {weight, bias, all.mean + i, all.rstd + i, eps};
            (is_forward ? factors_forward : factors_backward)(
                norm, i * size, (i + 1) * size, (double)pixels * size, space, space + width, by_g, by_x, plus);
        }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int64_t t = 0; t < threads; t++) {
            int64_t start = least(t * part, pixels), rows = least(start + part, pixels) - start;
            const bf16 *own = x + start * channels;
            if (has_silu && is_forward) activate(own, rows, channels, (Normal){by_g, plus}, y + start * channels);
            else mix(own, g + start * channels, rows, channels, behind, by_g, by_x, plus, y + start * channels);
        }
    }
    free(space);
    return 1;
}
