/* Group normalisation (Wu and He 2018) of pictures in bf16 whose channels lie close, and its gradient. */
#include "vectors.h"
#include <math.h>
#include <string.h>

enum { ROWS = 8 };  /* whose sums stay in registers */

/* for each channel: sums += the sum of g over rows, and products += that of g x */
static void add_sums(const bf16 *x, const bf16 *g, int64_t rows, int64_t channels, float *sums, float *products) {
    for (int64_t r = 0; r < rows; r += ROWS)
        for (int64_t c = 0; c < channels; c += 16) {
            __m512 sum = _mm512_load_ps(sums + c), product = _mm512_load_ps(products + c);
            for (int64_t i = r; i < least(rows, r + ROWS); i++) {
                __m512 a = get(g + i * channels + c, channels - c);
                sum = _mm512_add_ps(sum, a);
                product = _mm512_fmadd_ps(a, get(x + i * channels + c, channels - c), product);
            }
            _mm512_store_ps(sums + c, sum);
            _mm512_store_ps(products + c, product);
        }
}

/* y = by_g g + by_x x + plus, with a factor each and a summand for each channel */
static void mix(const bf16 *x, const bf16 *g, int64_t rows, int64_t channels, const float *by_g, const float *by_x,
                const float *plus, bf16 *y) {
    for (int64_t r = 0; r < rows; r++, x += channels, g += channels, y += channels)
        for (int64_t c = 0; c < channels; c += 16) {
            __m512 sum = _mm512_fmadd_ps(get(x + c, channels - c), _mm512_load_ps(by_x + c), _mm512_load_ps(plus + c));
            put(_mm512_fmadd_ps(get(g + c, channels - c), _mm512_load_ps(by_g + c), sum), channels - c, y + c);
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

/* x [B, pixels, C] and the gradient g of y or, forward, x again -> the gradient of x or, forward, y; mean and rstd
   [B, groups]; 0 where memory ran out */
int group_norm(const bf16 *x, const bf16 *g, const bf16 *weight, const bf16 *bias, float *mean, float *rstd, bf16 *y,
               int64_t batch, int64_t pixels, int64_t channels, int64_t groups, float eps, int is_forward,
               int threads) {
    int64_t width = up_to(channels, 16), part = (pixels + threads - 1) / threads, size = channels / groups;
    float *space = aligned_alloc(64, (2 * threads + 3) * width * 4);
    float *by_g = space + 2 * threads * width, *by_x = by_g + width, *plus = by_x + width;
    if (!space) return 0;
    for (int64_t b = 0; b < batch; b++, x += pixels * channels, g += pixels * channels, y += pixels * channels) {
        memset(space, 0, (2 * threads + 3) * width * 4);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int64_t t = 0; t < threads; t++) {
            int64_t start = least(t * part, pixels), end = least(start + part, pixels);
            float *sums = space + 2 * t * width;
            add_sums(x + start * channels, g + start * channels, end - start, channels, sums, sums + width);
        }
        for (int64_t i = 2 * width; i < 2 * threads * width; i++) space[i % (2 * width)] += space[i];
        for (int64_t i = 0; i < groups; i++) {
            Norm norm = {weight, bias, mean + b * groups + i, rstd + b * groups + i, eps};
            (is_forward ? factors_forward : factors_backward)(
                norm, i * size, (i + 1) * size, (double)pixels * size, space, space + width, by_g, by_x, plus);
        }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int64_t t = 0; t < threads; t++) {
            int64_t start = least(t * part, pixels), end = least(start + part, pixels);
            mix(x + start * channels, g + start * channels, end - start, channels, by_g, by_x, plus,
                y + start * channels);
        }
    }
    free(space);
    return 1;
}
