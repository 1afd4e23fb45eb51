#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <omp.h>

typedef uint16_t bf16;
enum { TILE = 16, STEP = 32, BLOCK = 128 };

typedef struct { uint8_t palette, start; uint8_t zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } TileConfig;

int init_amx(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

static void configure_tiles(void) {
    TileConfig c;
    memset(&c, 0, sizeof c);
    c.palette = 1;
    for (int i = 0; i < 8; i++) { c.bytes[i] = 64; c.rows[i] = 16; }
    _tile_loadconfig(&c);
}

static inline int64_t up_to(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
static inline float widened(bf16 x) { uint32_t u = (uint32_t)x << 16; float f; memcpy(&f, &u, 4); return f; }
static inline bf16 narrowed(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (bf16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

/* rows [n, d] -> [np, dp], zeros around */
static void padded(const bf16 *x, int64_t stride, int64_t n, int64_t d, int64_t np, int64_t dp, bf16 *out) {
    for (int64_t i = 0; i < np; i++) {
        if (i < n) { memcpy(out + i * dp, x + i * stride, d * 2); memset(out + i * dp + d, 0, (dp - d) * 2); }
        else memset(out + i * dp, 0, dp * 2);
    }
}
/* [np, dp] -> [np/16][dp/2][16][2]: a right-hand operand whose columns are the rows of x */
static void as_columns(const bf16 *x, int64_t np, int64_t dp, bf16 *out) {
    uint32_t *o = (uint32_t *)out;
    for (int64_t b = 0; b < np / TILE; b++)
        for (int64_t r = 0; r < TILE; r++) {
            const uint32_t *row = (const uint32_t *)(x + (b * TILE + r) * dp);
            for (int64_t p = 0; p < dp / 2; p++) o[(b * (dp / 2) + p) * TILE + r] = row[p];
        }
}
/* [np, dp] -> [np/32][dc/16][16][16][2]: a right-hand operand whose rows are the rows of x */
static void as_rows(const bf16 *x, int64_t np, int64_t dp, int64_t dc, bf16 *out) {
    for (int64_t b = 0; b < np / STEP; b++)
        for (int64_t c = 0; c < dc / TILE; c++)
            for (int64_t p = 0; p < TILE; p++) {
                const bf16 *lo = x + (b * STEP + 2 * p) * dp + c * TILE, *hi = lo + dp;
                bf16 *to = out + (((b * (dc / TILE) + c) * TILE + p) * TILE) * 2;
                for (int j = 0; j < TILE; j++) { to[2 * j] = lo[j]; to[2 * j + 1] = hi[j]; }
            }
}
/* [np, dp] -> [np/32][dc][32]: a left-hand operand, transposed */
static void transposed(const bf16 *x, int64_t np, int64_t dp, int64_t dc, bf16 *out) {
    for (int64_t b = 0; b < np / STEP; b++)
        for (int64_t j = 0; j < STEP; j++)
            for (int64_t c = 0; c < dc; c++) out[(b * dc + c) * STEP + j] = x[(b * STEP + j) * dp + c];
}

static inline __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-127.0f));
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.3534167e-2f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.2011464e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4144275e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9300383e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0000026f));
    return _mm512_scalef_ps(p, n);
}

typedef struct {
    int64_t n, m, d, np, mp, dp, dc;
    bf16 *pad, *q_cols, *q_rows, *g_cols, *g_rows, *k, *v, *k_t, *p, *ds, *ds_pairs;
    float *lse, *delta, *dq, *dk, *dv;
} Scratch;

static void *cut(char **at, int64_t bytes) { void *p = *at; *at += up_to(bytes, 64); return p; }
static int64_t layout(Scratch *s, char *base) {
    char *at = base;
    int64_t most = s->np > s->mp ? s->np : s->mp;
    s->pad = cut(&at, most * s->dp * 2);
    s->q_cols = cut(&at, s->np * s->dp * 2); s->g_cols = cut(&at, s->np * s->dp * 2);
    s->q_rows = cut(&at, s->np * s->dc * 2); s->g_rows = cut(&at, s->np * s->dc * 2);
    s->k = cut(&at, s->mp * s->dp * 2); s->v = cut(&at, s->mp * s->dp * 2); s->k_t = cut(&at, s->mp * s->dc * 2);
    s->p = cut(&at, BLOCK * BLOCK * 2); s->ds = cut(&at, BLOCK * BLOCK * 2); s->ds_pairs = cut(&at, BLOCK * BLOCK * 2);
    s->lse = cut(&at, s->np * 4); s->delta = cut(&at, s->np * 4);
    s->dq = cut(&at, s->np * s->dc * 4);
    s->dk = cut(&at, BLOCK * s->dc * 4); s->dv = cut(&at, BLOCK * s->dc * 4);
    return at - base;
}

/* out [32, 32] fp32 = a [32, dp] times b, columns as in as_columns */
static inline void product_32(const bf16 *a, const bf16 *b, int64_t dp, float *out) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t s = 0; s < dp / STEP; s++) {
        _tile_loadd(4, a + s * STEP, dp * 2);
        _tile_loadd(5, a + TILE * dp + s * STEP, dp * 2);
        _tile_loadd(6, b + s * TILE * TILE * 2, 64);
        _tile_loadd(7, b + (dp / 2 + s * TILE) * TILE * 2, 64);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, 128); _tile_stored(1, out + 16, 128);
    _tile_stored(2, out + 16 * 32, 128); _tile_stored(3, out + 16 * 32 + 16, 128);
}

static const uint16_t PAIRS[32] __attribute__((aligned(64))) = {
    0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

static inline __m512i both(__m512 hi, __m512 lo) { return (__m512i)_mm512_cvtne2ps_pbh(hi, lo); }

/* probabilities and gradients of the logits of 32 keys x 32 queries */
static inline void soften(const float *s, const float *dp, const float *lse, const float *delta, float scale,
                          int64_t num_keys, bf16 *p, bf16 *ds, bf16 *pairs, int64_t pairs_stride) {
    const __m512i order = _mm512_load_si512(PAIRS);
    const __m512 l0 = _mm512_loadu_ps(lse), l1 = _mm512_loadu_ps(lse + 16), factor = _mm512_set1_ps(scale);
    const __m512 d0 = _mm512_loadu_ps(delta), d1 = _mm512_loadu_ps(delta + 16);
    for (int r = 0; r < 32; r += 2) {
        __m512 g[4];
        for (int h = 0; h < 2; h++) {
            const float *row = s + (r + h) * 32, *drow = dp + (r + h) * 32;
            __m512 e0 = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(row), factor, l0));
            __m512 e1 = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(row + 16), factor, l1));
            if (r + h >= num_keys) e0 = e1 = _mm512_setzero_ps();
            g[h] = _mm512_mul_ps(e0, _mm512_sub_ps(_mm512_load_ps(drow), d0));
            g[2 + h] = _mm512_mul_ps(e1, _mm512_sub_ps(_mm512_load_ps(drow + 16), d1));
            _mm512_store_si512(p + (r + h) * 32, both(e1, e0));
            _mm512_store_si512(ds + (r + h) * 32, both(g[2 + h], g[h]));
        }
        _mm512_store_si512(pairs + r * TILE, _mm512_permutexvar_epi16(order, both(g[1], g[0])));
        _mm512_store_si512(pairs + pairs_stride + r * TILE, _mm512_permutexvar_epi16(order, both(g[3], g[2])));
    }
}

/* out [rows, dc] += a times b: a in blocks [steps][a_rows][32], b in [steps][dc/16][16][16][2] */
static void add_rows(float *out, const bf16 *a, int64_t a_rows, const bf16 *b, int64_t rows, int64_t dc, int64_t steps) {
    for (int64_t r = 0; r < rows; r += STEP) {
        float *o = out + r * dc;
        int64_t c = 0;
        for (; c + 1 < dc / TILE; c += 2) {
            float *t = o + c * TILE;
            _tile_loadd(0, t, dc * 4); _tile_loadd(1, t + TILE, dc * 4);
            _tile_loadd(2, t + TILE * dc, dc * 4); _tile_loadd(3, t + TILE * dc + TILE, dc * 4);
            for (int64_t s = 0; s < steps; s++) {
                _tile_loadd(4, a + (s * a_rows + r) * STEP, 64); _tile_loadd(5, a + (s * a_rows + r + TILE) * STEP, 64);
                _tile_loadd(6, b + (s * (dc / TILE) + c) * 512, 64); _tile_loadd(7, b + (s * (dc / TILE) + c + 1) * 512, 64);
                _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, t, dc * 4); _tile_stored(1, t + TILE, dc * 4);
            _tile_stored(2, t + TILE * dc, dc * 4); _tile_stored(3, t + TILE * dc + TILE, dc * 4);
        }
        if (c < dc / TILE) {
            float *t = o + c * TILE;
            _tile_loadd(0, t, dc * 4); _tile_loadd(2, t + TILE * dc, dc * 4);
            for (int64_t s = 0; s < steps; s++) {
                _tile_loadd(4, a + (s * a_rows + r) * STEP, 64); _tile_loadd(5, a + (s * a_rows + r + TILE) * STEP, 64);
                _tile_loadd(6, b + (s * (dc / TILE) + c) * 512, 64);
                _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(2, 5, 6);
            }
            _tile_stored(0, t, dc * 4); _tile_stored(2, t + TILE * dc, dc * 4);
        }
    }
}

/* dq [query blocks of 32][dc][32] += k_t [steps][dc][32] times pairs [2 x query blocks][keys/2][16][2] */
static void add_columns(float *dq, const bf16 *k_t, const bf16 *pairs, int64_t keys, int64_t blocks, int64_t dc) {
    int64_t steps = keys / STEP, stride = (int64_t)BLOCK * TILE;
    for (int64_t b = 0; b < blocks; b++) {
        const bf16 *one = pairs + 2 * b * stride, *two = one + stride;
        int64_t c = 0;
        for (; c + 1 < dc / TILE; c += 2) {
            float *t = dq + (b * dc + c * TILE) * STEP;
            _tile_loadd(0, t, 128); _tile_loadd(1, t + 16, 128);
            _tile_loadd(2, t + 16 * 32, 128); _tile_loadd(3, t + 16 * 32 + 16, 128);
            for (int64_t s = 0; s < steps; s++) {
                _tile_loadd(4, k_t + (s * dc + c * TILE) * STEP, 64); _tile_loadd(5, k_t + (s * dc + (c + 1) * TILE) * STEP, 64);
                _tile_loadd(6, one + s * 512, 64); _tile_loadd(7, two + s * 512, 64);
                _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, t, 128); _tile_stored(1, t + 16, 128);
            _tile_stored(2, t + 16 * 32, 128); _tile_stored(3, t + 16 * 32 + 16, 128);
        }
        if (c < dc / TILE) {
            float *t = dq + (b * dc + c * TILE) * STEP;
            _tile_loadd(0, t, 128); _tile_loadd(1, t + 16, 128);
            for (int64_t s = 0; s < steps; s++) {
                _tile_loadd(4, k_t + (s * dc + c * TILE) * STEP, 64);
                _tile_loadd(6, one + s * 512, 64); _tile_loadd(7, two + s * 512, 64);
                _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
            }
            _tile_stored(0, t, 128); _tile_stored(1, t + 16, 128);
        }
    }
}

typedef struct { bf16 *data; int64_t batch, head, row; } View;
static bf16 *head_of(View x, int64_t b, int64_t h) { return x.data + b * x.batch + h * x.head; }

static void head_backward(Scratch *s, const bf16 *q, int64_t qs, const bf16 *k, int64_t ks, const bf16 *v, int64_t vs,
                          const bf16 *o, int64_t os, const bf16 *g, int64_t gs, const float *lse, float scale,
                          bf16 *dq, int64_t dqs, bf16 *dk, int64_t dks, bf16 *dv, int64_t dvs) {
    const float log2e = 1.44269504f;
    int64_t n = s->n, m = s->m, d = s->d, np = s->np, mp = s->mp, dp = s->dp, dc = s->dc;
    padded(q, qs, n, d, np, dp, s->pad); as_columns(s->pad, np, dp, s->q_cols); as_rows(s->pad, np, dp, dc, s->q_rows);
    padded(g, gs, n, d, np, dp, s->pad); as_columns(s->pad, np, dp, s->g_cols); as_rows(s->pad, np, dp, dc, s->g_rows);
    padded(k, ks, m, d, mp, dp, s->k); transposed(s->k, mp, dp, dc, s->k_t);
    padded(v, vs, m, d, mp, dp, s->v);
    for (int64_t i = 0; i < np; i++) {
        float sum = 0;
        if (i < n) for (int64_t j = 0; j < d; j++) sum += widened(o[i * os + j]) * widened(g[i * gs + j]);
        s->delta[i] = sum;
        s->lse[i] = i < n ? lse[i] * log2e : 0;
    }
    memset(s->dq, 0, np * dc * 4);
    float logits[32 * 32] __attribute__((aligned(64))), grads[32 * 32] __attribute__((aligned(64)));
    for (int64_t j = 0; j < mp; j += BLOCK) {
        int64_t keys = mp - j < BLOCK ? mp - j : BLOCK;
        memset(s->dk, 0, keys * dc * 4); memset(s->dv, 0, keys * dc * 4);
        for (int64_t i = 0; i < np; i += BLOCK) {
            int64_t blocks = (np - i < BLOCK ? np - i : BLOCK) / STEP;
            for (int64_t b = 0; b < blocks; b++)
                for (int64_t r = 0; r < keys; r += STEP) {
                    int64_t at = i + b * STEP;
                    product_32(s->k + (j + r) * dp, s->q_cols + at * dp, dp, logits);
                    product_32(s->v + (j + r) * dp, s->g_cols + at * dp, dp, grads);
                    soften(logits, grads, s->lse + at, s->delta + at, scale * log2e, m - j - r,
                           s->p + (b * keys + r) * STEP, s->ds + (b * keys + r) * STEP,
                           s->ds_pairs + 2 * b * BLOCK * TILE + r * TILE, (int64_t)BLOCK * TILE);
                }
            add_rows(s->dv, s->p, keys, s->g_rows + i * dc, keys, dc, blocks);
            add_rows(s->dk, s->ds, keys, s->q_rows + i * dc, keys, dc, blocks);
            add_columns(s->dq + i * dc, s->k_t + j * dc, s->ds_pairs, keys, blocks, dc);
        }
        for (int64_t r = 0; r < keys && j + r < m; r++)
            for (int64_t c = 0; c < d; c++) {
                dk[(j + r) * dks + c] = narrowed(s->dk[r * dc + c] * scale);
                dv[(j + r) * dvs + c] = narrowed(s->dv[r * dc + c]);
            }
    }
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < d; c++)
            dq[i * dqs + c] = narrowed(s->dq[((i / STEP) * dc + c) * STEP + i % STEP] * scale);
}

/* all [B, H, rows, d] of bf16 but lse [B, H, n] of fp32; 0 where memory ran out */
int attention_backward(View q, View k, View v, View o, View g, const float *lse, View dq, View dk, View dv,
                       int64_t batch, int64_t heads, int64_t n, int64_t m, int64_t d, float scale, int threads) {
    int ok = 1;
#pragma omp parallel num_threads(threads)
    {
        Scratch s = {.n = n, .m = m, .d = d, .np = up_to(n, STEP), .mp = up_to(m, STEP), .dp = up_to(d, STEP), .dc = up_to(d, TILE)};
        char *base = aligned_alloc(64, layout(&s, 0));
        if (base) {
            layout(&s, base);
            configure_tiles();
        } else {
#pragma omp atomic write
            ok = 0;
        }
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (int64_t at = 0; at < batch * heads; at++) {
            if (!base) continue;
            int64_t b = at / heads, h = at % heads;
            head_backward(&s, head_of(q, b, h), q.row, head_of(k, b, h), k.row, head_of(v, b, h), v.row, head_of(o, b, h),
                          o.row, head_of(g, b, h), g.row, lse + at * n, scale, head_of(dq, b, h), dq.row,
                          head_of(dk, b, h), dk.row, head_of(dv, b, h), dv.row);
        }
        if (base) { _tile_release(); free(base); }
    }
    return ok;
}
