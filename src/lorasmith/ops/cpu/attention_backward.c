/* The gradients of attention by blocks (Dao et al. 2022, "FlashAttention", algorithm 4). */
#include "products.h"

/* in a block; the more keys, the fewer passes over the queries, which come from far */
enum { KEYS = 256, QUERIES = 128 };

/* n queries and m keys of width d; np and mp: up to whole STEPs, dp and dc: d up to whole STEPs and TILEs */
typedef struct {
    int64_t n, m, d, np, mp, dp, dc;
    float scale;
    bf16 *q_cols, *q_rows, *g_cols, *g_rows, *k, *v, *k_t, *p, *ds, *pairs;
    float *logits, *slopes, *lse, *delta, *dq, *dk, *dv;
} Work;

static int64_t layout(Work *w, char *base) {
    char *at = base;
    w->q_cols = cut(&at, w->np * w->dp * 2); w->g_cols = cut(&at, w->np * w->dp * 2);
    w->q_rows = cut(&at, w->np * w->dc * 2); w->g_rows = cut(&at, w->np * w->dc * 2);
    w->k = cut(&at, w->mp * w->dp * 2); w->v = cut(&at, w->mp * w->dp * 2); w->k_t = cut(&at, w->mp * w->dc * 2);
    w->p = cut(&at, KEYS * QUERIES * 2); w->ds = cut(&at, KEYS * QUERIES * 2); w->pairs = cut(&at, KEYS * STEP * 2);
    w->logits = cut(&at, KEYS * STEP * 4); w->slopes = cut(&at, KEYS * STEP * 4);
    w->lse = cut(&at, w->np * 4); w->delta = cut(&at, w->np * 4);
    w->dq = cut(&at, w->np * w->dc * 4);
    w->dk = cut(&at, KEYS * w->dc * 4); w->dv = cut(&at, KEYS * w->dc * 4);
    return at - base;
}

/* Probabilities, and gradients of the logits, of 32 keys and 32 queries; slopes [32, 32]: those of the probabilities.
   The pairs of rows lie as a right-hand operand, whose columns are the queries in the order that query() tells. */
static inline void soften(const float *logits, const float *slopes, const float *lse, const float *delta, float scale,
                          int64_t num_keys, bf16 *p, bf16 *ds, bf16 *pairs) {
    const __m512 l0 = _mm512_loadu_ps(lse), l1 = _mm512_loadu_ps(lse + 16), factor = _mm512_set1_ps(scale);
    const __m512 d0 = _mm512_loadu_ps(delta), d1 = _mm512_loadu_ps(delta + 16);
    for (int r = 0; r < 32; r += 2) {
        __m512i g[2];
        for (int h = 0; h < 2; h++) {
            const float *row = logits + (r + h) * 32, *slope = slopes + (r + h) * 32;
            __m512 e0 = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(row), factor, l0));
            __m512 e1 = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(row + 16), factor, l1));
            if (r + h >= num_keys) e0 = e1 = _mm512_setzero_ps();
            g[h] = narrowed(_mm512_mul_ps(e1, _mm512_sub_ps(_mm512_load_ps(slope + 16), d1)),
                            _mm512_mul_ps(e0, _mm512_sub_ps(_mm512_load_ps(slope), d0)));
            _mm512_store_si512(p + (r + h) * 32, narrowed(e1, e0));
            _mm512_store_si512(ds + (r + h) * 32, g[h]);
        }
        _mm512_store_si512(pairs + r * TILE, _mm512_unpacklo_epi16(g[0], g[1]));
        _mm512_store_si512(pairs + KEYS * TILE + r * TILE, _mm512_unpackhi_epi16(g[0], g[1]));
    }
}
/* which of 32 queries is column i of the pairs */
static inline int64_t query(int64_t i) { return i % 4 + i % 16 / 4 * 8 + i / 16 * 4; }

/* what is made of q, k, v, and the gradient g of the result o; lse [n] */
static void prepare(Work *w, Rows q, Rows k, Rows v, Rows o, Rows g, const float *lse) {
    as_columns(q, w->np, w->dp, w->q_cols); as_rows(q, w->np, w->dc, w->q_rows);
    as_columns(g, w->np, w->dp, w->g_cols); as_rows(g, w->np, w->dc, w->g_rows);
    as_left(k, w->mp, w->dp, w->k); as_left_transposed(k, w->mp, w->dc, w->k_t);
    as_left(v, w->mp, w->dp, w->v);
    for (int64_t i = 0; i < w->np; i++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < w->dp; c += STEP) {
            __m512i a = part(o, i, c), b = part(g, i, c);
            sum = _mm512_fmadd_ps(even(a), even(b), _mm512_fmadd_ps(odd(a), odd(b), sum));
        }
        w->delta[i] = _mm512_reduce_add_ps(sum);
        w->lse[i] = i < w->n ? lse[i] * LOG2_E : 0;
    }
    memset(w->dq, 0, w->np * w->dc * 4);
}

/* adds what the keys from row j on and the queries from row i on give to each other */
static void add_block(Work *w, int64_t i, int64_t j) {
    int64_t keys = least(w->mp - j, KEYS), strips = least(w->np - i, QUERIES) / STEP, dp = w->dp, dc = w->dc;
    for (int64_t b = 0; b < strips; b++) {
        int64_t at = i + b * STEP;
        for (int64_t r = 0; r < keys; r += STEP) {
            product_32(w->k + (j + r) * dp, w->q_cols + at * dp, w->d, w->logits + r * STEP);
            product_32(w->v + (j + r) * dp, w->g_cols + at * dp, w->d, w->slopes + r * STEP);
        }
        for (int64_t r = 0; r < keys; r += STEP)
            soften(w->logits + r * STEP, w->slopes + r * STEP, w->lse + at, w->delta + at, w->scale * LOG2_E,
                   w->m - j - r, w->p + (b * keys + r) * STEP, w->ds + (b * keys + r) * STEP, w->pairs + r * TILE);
        add_columns(w->dq + at * dc, w->k_t + j * dc, w->pairs, KEYS * TILE, dc, keys / STEP);
    }
    add_rows(w->dv, w->p, w->g_rows + i * dc, keys, dc, strips);
    add_rows(w->dk, w->ds, w->q_rows + i * dc, keys, dc, strips);
}

/* the gradient of the queries, of which 32 are columns in w->dq [np/32][dc][32] */
static void put_queries(const Work *w, Rows dq) {
    const __m512 scale = _mm512_set1_ps(w->scale);
    for (int64_t i = 0; i < w->np; i += TILE)
        for (int64_t c = 0; c < dq.d; c += TILE) {
            __m512 r[TILE];
            const float *from = w->dq + i / STEP * STEP * w->dc + c * STEP + i % STEP;
            for (int j = 0; j < TILE; j++) r[j] = _mm512_load_ps(from + j * STEP);
            transpose((__m512i *)r);
            for (int64_t j = 0; j < TILE; j++) {
                int64_t row = i / STEP * STEP + query(i % STEP + j);
                if (row < dq.n) put(_mm512_mul_ps(r[j], scale), dq.d - c, dq.data + row * dq.row + c);
            }
        }
}

static void head_backward(Work *w, Rows dq, Rows dk, Rows dv) {
    for (int64_t j = 0; j < w->mp; j += KEYS) {
        int64_t keys = least(w->mp - j, KEYS);
        memset(w->dk, 0, keys * w->dc * 4); memset(w->dv, 0, keys * w->dc * 4);
        for (int64_t i = 0; i < w->np; i += QUERIES) add_block(w, i, j);
        for (int64_t r = 0; r < least(w->m - j, KEYS); r++) {
            put_row(w->dk + r * w->dc, w->scale, dk.d, dk.data + (j + r) * dk.row);
            put_row(w->dv + r * w->dc, 1, dv.d, dv.data + (j + r) * dv.row);
        }
    }
    put_queries(w, dq);
}

/* all [B, H, rows, d] of bf16 but lse [B, H, n] of fp32; 0 where memory ran out */
int attention_backward(View q, View k, View v, View o, View g, const float *lse, View dq, View dk, View dv,
                       int64_t batch, int64_t heads, int64_t n, int64_t m, int64_t d, float scale, int threads) {
    int ok = 1;
#pragma omp parallel num_threads(threads)
    {
        Work w = {.n = n, .m = m, .d = d, .scale = scale};
        w.np = up_to(n, STEP); w.mp = up_to(m, STEP); w.dp = up_to(d, STEP); w.dc = up_to(d, TILE);
        char *base = aligned_alloc(64, layout(&w, 0));
        if (base) {
            layout(&w, base);
            begin_products();
        } else {
#pragma omp atomic write
            ok = 0;
        }
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (int64_t at = 0; at < batch * heads; at++) {
            if (!base) continue;
            int64_t b = at / heads, h = at % heads;
            prepare(&w, rows_of(q, b, h, n, d), rows_of(k, b, h, m, d), rows_of(v, b, h, m, d), rows_of(o, b, h, n, d),
                    rows_of(g, b, h, n, d), lse + at * n);
            head_backward(&w, rows_of(dq, b, h, n, d), rows_of(dk, b, h, m, d), rows_of(dv, b, h, m, d));
        }
        if (base) { end_products(); free(base); }
    }
    return ok;
}
