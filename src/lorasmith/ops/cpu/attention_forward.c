/* Attention by blocks (Dao et al. 2022, "FlashAttention", algorithm 1): a row of 32 queries goes over blocks of keys. */
#include <math.h>
#include "products.h"

/* keys in a block; strips of queries that share it, where a head's keys and values are too many for a core's cache */
enum { KEYS = 64, STRIPS = 4, CACHE = 1 << 20 };

/* How far, in powers of two, a logit may rise above its query's shift before the shift follows: bf16 and fp32 have the
   exponents for it, and most blocks of keys then change nothing of what was added up before. */
static const float HEADROOM = 16;

typedef struct { bf16 *q; float *out, *sums, *shift, *most; } Strip;  /* of 32 queries */
typedef struct { float factor; float *logits; bf16 *p; Strip strips[STRIPS]; } Work;

static int64_t layout(Work *w, int64_t dp, int64_t dc, char *base) {
    char *at = base;
    w->logits = cut(&at, STEP * KEYS * 4); w->p = cut(&at, STEP * KEYS * 2);
    for (Strip *x = w->strips; x < w->strips + STRIPS; x++) {
        x->q = cut(&at, STEP * dp * 2); x->out = cut(&at, STEP * dc * 4); x->sums = cut(&at, STEP * TILE * 4);
        x->shift = cut(&at, STEP * 4); x->most = cut(&at, STEP * 4);
    }
    return at - base;
}

/* x [16][16] -> the sum, or the greatest, of each row */
static inline __m512 folded(__m512 x[TILE], int is_sum) {
    transpose((__m512i *)x);
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; i++)
            x[i] = is_sum ? _mm512_add_ps(x[i], x[i + step]) : _mm512_max_ps(x[i], x[i + step]);
    return x[0];
}

/* log x = e log 2 + 2 artanh((m - 1) / (m + 1)) for x = m 2^e, by five terms of its series; m near 1 */
static inline __m512 natural_log(__m512 x) {
    __m512 e = _mm512_getexp_ps(x), m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    const __m512 one = _mm512_set1_ps(1);
    __mmask16 high = _mm512_cmp_ps_mask(m, _mm512_set1_ps(1.41421356f), _CMP_GT_OQ);
    m = _mm512_mask_mul_ps(m, high, m, _mm512_set1_ps(0.5f));
    e = _mm512_mask_add_ps(e, high, e, one);
    __m512 t = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one)), t2 = _mm512_mul_ps(t, t);
    __m512 p = _mm512_set1_ps(2.0f / 9);
    for (int k = 7; k > 0; k -= 2) p = _mm512_fmadd_ps(p, t2, _mm512_set1_ps(2.0f / k));
    return _mm512_fmadd_ps(e, _mm512_set1_ps(1 / LOG2_E), _mm512_mul_ps(p, t));
}

/* Sees to it that no logit [blocks][32][32] is too far above its query's shift. */
static void shift_logits(Strip *x, const float *logits, float factor, int64_t blocks, int64_t dc) {
    for (int half = 0; half < STEP; half += TILE) {
        __m512 most[TILE];
        __mmask16 above = 0;
        for (int r = 0; r < TILE; r++) {
            const float *row = logits + (half + r) * STEP;
            most[r] = _mm512_max_ps(_mm512_load_ps(row), _mm512_load_ps(row + TILE));
            for (int64_t s = 1; s < blocks; s++) {
                const float *next = row + s * STEP * STEP;
                most[r] = _mm512_max_ps(most[r], _mm512_max_ps(_mm512_load_ps(next), _mm512_load_ps(next + TILE)));
            }
            above |= _mm512_cmp_ps_mask(most[r], _mm512_set1_ps(x->most[half + r]), _CMP_NLE_UQ);
        }
        if (!above) continue;
        __m512 before = _mm512_load_ps(x->shift + half), by = _mm512_set1_ps(factor);
        __m512 now = _mm512_max_ps(before, _mm512_mul_ps(folded(most, 0), by));
        float rescale[TILE] __attribute__((aligned(64)));
        _mm512_store_ps(x->shift + half, now);
        _mm512_store_ps(x->most + half, _mm512_div_ps(_mm512_add_ps(now, _mm512_set1_ps(HEADROOM)), by));
        _mm512_store_ps(rescale, exp2_of(_mm512_sub_ps(before, now)));
        for (int r = 0; r < TILE; r++) {
            float *sum = x->sums + (half + r) * TILE, *out = x->out + (half + r) * dc;
            by = _mm512_set1_ps(rescale[r]);
            _mm512_store_ps(sum, _mm512_mul_ps(_mm512_load_ps(sum), by));
            for (int64_t c = 0; c < dc; c += TILE) _mm512_store_ps(out + c, _mm512_mul_ps(_mm512_load_ps(out + c), by));
        }
    }
}

/* logits [blocks][32][32] -> p, their exponentials, and the sums of these */
static inline void exponentials(Strip *x, const float *logits, float scale, int64_t blocks, bf16 *p) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (int r = 0; r < STEP; r++) {
        __m512 shift = _mm512_set1_ps(x->shift[r]), sum = _mm512_load_ps(x->sums + r * TILE);
        for (int64_t s = 0; s < blocks; s++) {
            int64_t at = (s * STEP + r) * STEP;
            __m512 lo = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(logits + at), factor, shift));
            __m512 hi = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(logits + at + TILE), factor, shift));
            sum = _mm512_add_ps(sum, _mm512_add_ps(lo, hi));
            _mm512_store_si512(p + at, narrowed(hi, lo));
        }
        _mm512_store_ps(x->sums + r * TILE, sum);
    }
}

/* the logits [32, 32] of 32 keys, minus infinity where there is none */
static inline void logits_of(const bf16 *q, const bf16 *k, int64_t d, int64_t num_keys, float *out) {
    product_32(q, k, d, out);
    if (num_keys >= STEP) return;
    __m512 none = _mm512_set1_ps(-INFINITY);
    for (int r = 0; r < STEP; r++) {
        _mm512_mask_store_ps(out + r * STEP, ~first_16(num_keys), none);
        _mm512_mask_store_ps(out + r * STEP + TILE, ~first_16(num_keys - TILE), none);
    }
}

static void begin(Strip *x, Rows q, int64_t dp, int64_t dc) {
    as_left(q, STEP, dp, x->q);
    memset(x->out, 0, STEP * dc * 4);
    memset(x->sums, 0, STEP * TILE * 4);
    for (int r = 0; r < STEP; r++) x->shift[r] = x->most[r] = -INFINITY;
}

/* the strip's results, and the logarithms of its sums */
static void finish(Strip *x, Rows out, int64_t dc, float *lse) {
    for (int half = 0; half < STEP; half += TILE) {
        float inverse[TILE] __attribute__((aligned(64)));
        __m512 sums[TILE];
        for (int r = 0; r < TILE; r++) sums[r] = _mm512_load_ps(x->sums + (half + r) * TILE);
        __m512 sum = folded(sums, 1), shift = _mm512_load_ps(x->shift + half);
        __m512 logarithm = _mm512_fmadd_ps(shift, _mm512_set1_ps(1 / LOG2_E), natural_log(sum));
        _mm512_mask_storeu_ps(lse + half, first_16(out.n - half), logarithm);
        _mm512_store_ps(inverse, _mm512_div_ps(_mm512_set1_ps(1), sum));
        for (int r = 0; r < TILE && half + r < out.n; r++)
            put_row(x->out + (half + r) * dc, inverse[r], out.d, out.data + (half + r) * out.row);
    }
}

/* The results of STRIPS x 32 queries at most, and the logarithms of their sums; k and v [m, d] as prepared. */
static void queries_forward(Work *w, Rows q, const bf16 *k, const bf16 *v, int64_t m, Rows out, float *lse) {
    int64_t mp = up_to(m, STEP), dp = up_to(q.d, STEP), dc = up_to(q.d, TILE), num = up_to(q.n, STEP) / STEP;
    for (int64_t i = 0; i < num; i++) begin(&w->strips[i], from(q, i * STEP), dp, dc);
    for (int64_t j = 0; j < mp; j += KEYS) {
        int64_t blocks = least(mp - j, KEYS) / STEP;
        for (Strip *x = w->strips; x < w->strips + num; x++) {
            for (int64_t s = 0; s < blocks; s++)
                logits_of(x->q, k + (j + s * STEP) * dp, q.d, m - j - s * STEP, w->logits + s * STEP * STEP);
            shift_logits(x, w->logits, w->factor, blocks, dc);
            exponentials(x, w->logits, w->factor, blocks, w->p);
            add_rows(x->out, w->p, v + j * dc, STEP, dc, blocks);
        }
    }
    for (int64_t i = 0; i < num; i++) finish(&w->strips[i], from(out, i * STEP), dc, lse + i * STEP);
}

/* all [B, H, rows, d] of bf16 but lse [B, H, n] of fp32; 0 where memory ran out */
int attention_forward(View q, View k, View v, float *lse, View out, int64_t batch, int64_t heads, int64_t n, int64_t m,
                      int64_t d, float scale, int threads) {
    int64_t mp = up_to(m, STEP), dp = up_to(d, STEP), dc = up_to(d, TILE);
    int64_t queries = mp * (dp + dc) * 2 > CACHE ? STRIPS * STEP : STEP, parts = up_to(n, queries) / queries;
    bf16 *columns = aligned_alloc(64, batch * heads * mp * dp * 2);
    bf16 *rows = aligned_alloc(64, batch * heads * mp * dc * 2);
    int ok = columns && rows;
#pragma omp parallel num_threads(threads)
    {
        Work w = {.factor = scale * LOG2_E};
        char *base = aligned_alloc(64, layout(&w, dp, dc, 0));
        if (base) {
            layout(&w, dp, dc, base);
            begin_products();
        } else {
#pragma omp atomic write
            ok = 0;
        }
#pragma omp barrier
        if (ok) {
#pragma omp for schedule(dynamic)
            for (int64_t at = 0; at < batch * heads; at++) {
                as_columns(rows_of(k, at / heads, at % heads, m, d), mp, dp, columns + at * mp * dp);
                as_rows(rows_of(v, at / heads, at % heads, m, d), mp, dc, rows + at * mp * dc);
            }
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < batch * heads * parts; task++) {
                int64_t at = task / parts, b = at / heads, h = at % heads;
                int64_t i = task % parts * queries, end = least(n, i + queries);
                queries_forward(&w, from(rows_of(q, b, h, end, d), i), columns + at * mp * dp, rows + at * mp * dc, m,
                                from(rows_of(out, b, h, end, d), i), lse + at * n + i);
            }
        }
        if (base) { end_products(); free(base); }
    }
    free(columns); free(rows);
    return ok;
}
