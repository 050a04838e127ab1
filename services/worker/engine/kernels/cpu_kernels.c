/* What the engine does on a CPU between two matrix products, one pass over memory each.
 *
 * Every result depends on its own row alone and is computed in one fixed order, whatever else is in the batch: that is
 * what makes an answer the same every time. Rows are split over OpenMP's threads, never the sums within a row.
 *
 * The KV pool of one layer (float32 or bfloat16), in blocks of BLOCK tokens:
 *   keys   [blocks, kv_heads, head_size, BLOCK]   so that one vector holds one dimension of BLOCK keys
 *   values [blocks, kv_heads, BLOCK, head_size]
 * Sums are float32 throughout. head_size is a multiple of 16, up to MAX_HEAD_SIZE.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 16
#define MAX_HEAD_SIZE 512
#define MAX_ROWS 8

typedef float vector __attribute__((vector_size(64)));
typedef int32_t integers __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
#define INLINE static inline __attribute__((always_inline))

enum dtype { FLOAT32 = 0, BFLOAT16 = 1 };

INLINE vector load(const void *base, long index, int dtype) {
    if (dtype == FLOAT32) {
        vector out;
        memcpy(&out, (const float *)base + index, sizeof out);
        return out;
    }
    halves raw;
    memcpy(&raw, (const uint16_t *)base + index, sizeof raw);
    return (vector)(__builtin_convertvector(raw, words) << 16);
}

/* Round to the nearest, ties to even, as torch does. */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float rounded(float value, int dtype) {
    if (dtype == FLOAT32) return value;
    uint32_t bits = (uint32_t)to_bfloat16(value) << 16;
    memcpy(&value, &bits, sizeof bits);
    return value;
}

INLINE void store(void *base, long index, vector value, int dtype) {
    if (dtype == FLOAT32) {
        memcpy((float *)base + index, &value, sizeof value);
        return;
    }
    words bits = (words)value;
    halves raw = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, halves);
    memcpy((uint16_t *)base + index, &raw, sizeof raw);
}

INLINE float get(const void *base, long index, int dtype) {
    if (dtype == FLOAT32) return ((const float *)base)[index];
    uint32_t bits = (uint32_t)((const uint16_t *)base)[index] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE void put(void *base, long index, float value, int dtype) {
    if (dtype == FLOAT32) ((float *)base)[index] = value;
    else ((uint16_t *)base)[index] = to_bfloat16(value);
}

INLINE vector choose(integers mask, vector yes, vector no) {
    return (vector)(((integers)yes & mask) | ((integers)no & ~mask));
}

INLINE float sum(vector v) {
    float total = 0;
    for (int i = 0; i < 16; i++) total += v[i];
    return total;
}

INLINE float maximum(vector v) {
    float most = v[0];
    for (int i = 1; i < 16; i++) most = v[i] > most ? v[i] : most;
    return most;
}

/* e^x for x <= 0, to about 2 units in the last place: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' expf). */
INLINE vector exponential(vector x) {
    x = choose(x < -87.0f, (vector){} - 87.0f, x);
    vector scaled = x * 1.44269504088896341f;
    integers n = __builtin_convertvector(scaled - 0.5f, integers); /* towards zero: rounds, as scaled <= 0 */
    vector whole = __builtin_convertvector(n, vector);
    vector r = x - whole * 0.693359375f - whole * -2.12194440e-4f;
    vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vector)((n + 127) << 23);
}

struct shape {
    long heads, kv_heads, head_size;
    long table_width; /* entries of one sequence's row in `tables` */
    long window;      /* keys that a token sees, itself included; 0: all before it */
    float scale, softcap; /* softcap 0: none */
};

struct item { /* up to MAX_ROWS / group tokens of one sequence, next to each other */
    int32_t sequence, row, tokens, position; /* its row in `tables`; first token's row in q; how many; its position */
};

/* Scores of `rows` queries against keys [begin, end) of a sequence into scores[row][key - begin]. */
INLINE void score_keys(float *scores, long stride, const float *query, const void *keys, const int32_t *table,
                       const struct shape *shape, long head, long begin, long end, const int rows, const int dtype) {
    const long size = shape->head_size;
    for (long block = begin / BLOCK; block * BLOCK < end; block++) {
        const long base = ((long)table[block] * shape->kv_heads + head) * size * BLOCK;
        vector total[MAX_ROWS] = {};
        for (long d = 0; d < size; d++) {
            const vector key = load(keys, base + d * BLOCK, dtype);
            for (int r = 0; r < rows; r++) total[r] += query[r * size + d] * key;
        }
        for (int r = 0; r < rows; r++) memcpy(scores + r * stride + (block - begin / BLOCK) * BLOCK, &total[r], 64);
    }
}

/* Turn one row's scores into weights; keys outside [first, last] get none. Returns the weights' sum. */
INLINE float weigh(float *scores, long padded, long offset, long first, long last, float scale, float softcap) {
    vector most = (vector){} - INFINITY;
    const integers lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (long i = 0; i < padded; i += 16) {
        vector s = load(scores, i, FLOAT32) * scale;
        if (softcap > 0)
            for (int j = 0; j < 16; j++) s[j] = softcap * tanhf(s[j] / softcap);
        const integers key = lane + (int32_t)(i + offset);
        s = choose((key < (int32_t)first) | (key > (int32_t)last), (vector){} - INFINITY, s);
        most = choose(s > most, s, most);
        store(scores, i, s, FLOAT32);
    }
    const float top = maximum(most);
    vector total = {};
    for (long i = 0; i < padded; i += 16) {
        const vector s = load(scores, i, FLOAT32);
        const vector weight = choose(s == -INFINITY, (vector){}, exponential(s - top));
        total += weight;
        store(scores, i, weight, FLOAT32);
    }
    return sum(total);
}

INLINE void mix_values(void *out, const float *weights, long stride, const float *totals, const void *values,
                       const int32_t *table, const struct shape *shape, long head, long begin, long end,
                       const long *places, const int rows, const int width, const int dtype) {
    const long size = shape->head_size;
    for (long d = 0; d < size; d += 16L * width) {
        vector total[MAX_ROWS][4] = {};
        for (long key = begin; key < end; key++) {
            const long base = (((long)table[key / BLOCK] * shape->kv_heads + head) * BLOCK + key % BLOCK) * size + d;
            for (int w = 0; w < width; w++) {
                const vector value = load(values, base + 16 * w, dtype);
                for (int r = 0; r < rows; r++) total[r][w] += weights[r * stride + key - begin] * value;
            }
        }
        for (int r = 0; r < rows; r++)
            for (int w = 0; w < width; w++) store(out, places[r] + d + 16 * w, total[r][w] / totals[r], dtype);
    }
}

/* Attention of one item's tokens for one KV head; `rows` = tokens * group queries share every key they load. */
INLINE void attend_item(void *out, const float *q, const void *keys, const void *values, const int32_t *tables,
                        const struct item *item, const struct shape *shape, long head, float *scores, const int rows,
                        const int dtype) {
    const long size = shape->head_size, group = shape->heads / shape->kv_heads;
    const int32_t *table = tables + item->sequence * shape->table_width;
    const long end = item->position + item->tokens;
    long begin = shape->window > 0 && item->position >= shape->window ? item->position - shape->window + 1 : 0;
    begin -= begin % BLOCK;
    const long stride = (end - begin + BLOCK - 1) / BLOCK * BLOCK;
    float query[MAX_ROWS * MAX_HEAD_SIZE], totals[MAX_ROWS];
    long places[MAX_ROWS];
    for (int r = 0; r < rows; r++) {
        places[r] = ((item->row + r / group) * shape->heads + head * group + r % group) * size;
        memcpy(query + r * size, q + places[r], size * sizeof(float));
    }
    score_keys(scores, stride, query, keys, table, shape, head, begin, end, rows, dtype);
    for (int r = 0; r < rows; r++) {
        const long last = item->position + r / group;
        const long first = shape->window > 0 ? last - shape->window + 1 : 0;
        totals[r] = weigh(scores + r * stride, stride, begin, first, last, shape->scale, shape->softcap);
    }
    if (rows <= 4 && size % 64 == 0)
        mix_values(out, scores, stride, totals, values, table, shape, head, begin, end, places, rows, 4, dtype);
    else if (size % 32 == 0)
        mix_values(out, scores, stride, totals, values, table, shape, head, begin, end, places, rows, 2, dtype);
    else
        mix_values(out, scores, stride, totals, values, table, shape, head, begin, end, places, rows, 1, dtype);
}

#define CASE(n) \
    case n: \
        attend_item(out, q, keys, values, tables, item, shape, head, scores, n, dtype); \
        break;

INLINE void attend_rows(void *out, const float *q, const void *keys, const void *values, const int32_t *tables,
                        const struct item *item, const struct shape *shape, long head, float *scores, const int dtype) {
    switch (item->tokens * (shape->heads / shape->kv_heads)) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
    }
}

static void attend_float32(void *out, const float *q, const void *keys, const void *values, const int32_t *tables,
                           const struct item *item, const struct shape *shape, long head, float *scores) {
    attend_rows(out, q, keys, values, tables, item, shape, head, scores, FLOAT32);
}

static void attend_bfloat16(void *out, const float *q, const void *keys, const void *values, const int32_t *tables,
                            const struct item *item, const struct shape *shape, long head, float *scores) {
    attend_rows(out, q, keys, values, tables, item, shape, head, scores, BFLOAT16);
}

/* out [tokens, heads, head_size] (dtype); q [tokens, heads, head_size] float32; tables [sequences, table_width].
 * `longest`: the most keys that any item sees. An item has at most MAX_ROWS queries a KV head. Returns 0, or 1 when
 * memory ran out. */
int attend(void *out, const float *q, const void *keys, const void *values, const int32_t *tables,
           const struct item *items, long count, const struct shape *shape, long longest, int dtype) {
    int failed = 0;
#pragma omp parallel
    {
        float *scores = malloc((longest + 2 * BLOCK) * MAX_ROWS * sizeof(float));
        if (scores == NULL) failed = 1;
#pragma omp for schedule(dynamic)
        for (long work = 0; work < count * shape->kv_heads; work++) {
            if (scores == NULL) continue;
            const struct item *item = items + work / shape->kv_heads;
            (dtype == FLOAT32 ? attend_float32 : attend_bfloat16)(out, q, keys, values, tables, item, shape,
                                                                  work % shape->kv_heads, scores);
        }
        free(scores);
    }
    return failed;
}

INLINE void rotate(float *head, const float *cosines, const float *sines, long rotated) {
    const long half = rotated / 2;
    for (long i = 0; i < half; i++) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cosines[i] - b * sines[i];
        head[i + half] = b * cosines[i + half] + a * sines[i + half];
    }
}

INLINE void normalize_head(float *head, const void *weight, long size, float epsilon, int dtype) {
    float squares = 0;
    for (long i = 0; i < size; i++) squares += head[i] * head[i];
    const float factor = 1.0f / sqrtf(squares / size + epsilon);
    for (long i = 0; i < size; i++)
        head[i] = rounded(rounded(head[i] * factor, dtype) * get(weight, i, dtype), dtype);
}

struct heads {
    long heads, kv_heads, head_size, rotated; /* rotated: dimensions of a head that carry its position; 0: none */
    const void *q_norm, *k_norm;              /* weights [head_size], or NULL */
    float epsilon;
};

INLINE void prepare_token(const void *qkv, float *q, void *keys, void *values, const float *cosines,
                          const float *sines, long slot, const struct heads *heads, int dtype) {
    const long size = heads->head_size;
    float head[MAX_HEAD_SIZE];
    for (long h = 0; h < heads->heads + heads->kv_heads; h++) {
        const int is_query = h < heads->heads;
        const void *norm = is_query ? heads->q_norm : heads->k_norm;
        for (long i = 0; i < size; i++) head[i] = get(qkv, h * size + i, dtype);
        if (norm != NULL) normalize_head(head, norm, size, heads->epsilon, dtype);
        if (heads->rotated) rotate(head, cosines, sines, heads->rotated);
        if (is_query) {
            for (long i = 0; i < size; i++) q[h * size + i] = rounded(head[i], dtype);
            continue;
        }
        const long base = (slot / BLOCK * heads->kv_heads + h - heads->heads) * size * BLOCK + slot % BLOCK;
        for (long i = 0; i < size; i++) put(keys, base + i * BLOCK, head[i], dtype);
    }
    const long first = (heads->heads + heads->kv_heads) * size, width = dtype == FLOAT32 ? 4 : 2;
    for (long h = 0; h < heads->kv_heads; h++) {
        const long base = ((slot / BLOCK * heads->kv_heads + h) * BLOCK + slot % BLOCK) * size;
        memcpy((char *)values + base * width, (const char *)qkv + (first + h * size) * width, size * width);
    }
}

/* Normalise and rotate the heads of qkv [tokens, (heads + 2 kv_heads) * head_size]: queries go to q (float32), keys
 * and values into the pool at slots [tokens]. cosines, sines: [positions, rotated]. */
void prepare_heads(const void *qkv, float *q, void *keys, void *values, const float *cosines, const float *sines,
                   const int32_t *positions, const int64_t *slots, long tokens, const struct heads *heads, int dtype) {
    const long width = (heads->heads + 2 * heads->kv_heads) * heads->head_size * (dtype == FLOAT32 ? 4 : 2);
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const long angle = positions[t] * heads->rotated;
        prepare_token((const char *)qkv + t * width, q + t * heads->heads * heads->head_size, keys, values,
                      cosines + angle, sines + angle, slots[t], heads, dtype);
    }
}

INLINE void add_norm_row(void *out, void *residual, const void *added, const void *weight, const void *bias, long size,
                         float epsilon, float offset, int dtype) {
    float mean = 0;
    vector total = {};
    long i = 0;
    for (; i + 16 <= size; i += 16) {
        vector x = load(residual, i, dtype);
        if (added != NULL) {
            x += load(added, i, dtype);
            store(residual, i, x, dtype);
            x = load(residual, i, dtype);
        }
        total += bias != NULL ? x : x * x;
    }
    if (bias != NULL) { /* layer norm: about the mean */
        mean = sum(total) / size;
        total = (vector){};
        for (i = 0; i < size; i += 16) {
            const vector x = load(residual, i, dtype) - mean;
            total += x * x;
        }
    }
    const float factor = 1.0f / sqrtf(sum(total) / size + epsilon);
    for (i = 0; i < size; i += 16) {
        const vector x = (load(residual, i, dtype) - mean) * factor;
        const vector scaled = x * (load(weight, i, dtype) + offset);
        store(out, i, bias != NULL ? scaled + load(bias, i, dtype) : scaled, dtype);
    }
}

/* residual [rows, size] += added (unless NULL); out = norm(residual) * (weight + offset), with a bias a layer norm and
 * without one an RMS norm. size is a multiple of 16. */
void add_norm(void *out, void *residual, const void *added, const void *weight, const void *bias, long rows, long size,
              float epsilon, float offset, int dtype) {
    const long width = size * (dtype == FLOAT32 ? 4 : 2);
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++)
        add_norm_row((char *)out + r * width, (char *)residual + r * width,
                     added == NULL ? NULL : (const char *)added + r * width, weight, bias, size, epsilon, offset, dtype);
}

enum activation { SILU = 0, GELU_TANH = 1 };

INLINE vector sigmoid(vector x) {
    const vector e = exponential(choose(x < 0, x, -x)); /* e^-|x| */
    return choose(x < 0, e, (vector){} + 1.0f) / (1.0f + e);
}

/* gelu's tanh form is x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)). */
INLINE vector activate(vector x, int activation) {
    if (activation == SILU) return x * sigmoid(x);
    return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
}

/* out [rows, size] = activation(gate) * up, of in [rows, 2 * size] = gate, up; without a gate (gated = 0) of
 * in [rows, size] the activation alone. size is a multiple of 16. */
void activate_rows(void *out, const void *in, long rows, long size, int gated, int activation, int dtype) {
    const long stride = gated ? 2 * size : size;
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < size; i += 16) {
            vector x = activate(load(in, r * stride + i, dtype), activation);
            if (gated) x *= load(in, r * stride + size + i, dtype);
            store(out, r * size + i, x, dtype);
        }
}

/* Adapters (LoRA): y += scale * (x A) B for the rows that belong to one.
 *
 * Matrices lie in panels of LANES columns: A [panels, in, LANES] has the ranks of all of a product's parts side by side,
 * filled up with zeros; each part's B is [panels, rank, LANES]. A row's sums go over `in`, and then over `rank`, one
 * addition after the other, however many rows and panels are computed beside it. */
#define LANES 16
#define MAX_PARTS 3
#define MAX_PANELS 8
#define AHEAD (16 * LANES)

struct lora_part {
    const void *b;
    long first, rank; /* its columns of x A */
    long start, size; /* its columns of y */
    float scale;
};

struct lora { /* one adapter's share of one product; no parts: the product is as the base has it */
    const void *a;
    long ranks, parts; /* columns of A, filled up */
    struct lora_part part[MAX_PARTS];
};

struct lora_item { /* the next `count` of one adapter's rows, at most MAX_ROWS: `rows[first]` on */
    int32_t adapter, first, count;
};

struct product { /* what an item's rows are multiplied with, and where the results go */
    const float *x[MAX_ROWS];
    void *out[MAX_ROWS];
    const void *matrix;
    long depth, size; /* rows and columns of the matrix */
    float scale;
};

/* `width` panels from `panel` on: out = x matrix (float32), or out += scale * x matrix where `adds`. */
INLINE void multiply_panels(const struct product *p, long panel, const int rows, const int width, const int adds,
                            const int dtype) {
    vector total[MAX_ROWS][MAX_PANELS] = {};
    for (long i = 0; i < p->depth; i++)
        for (int w = 0; w < width; w++) {
            const long place = ((panel + w) * p->depth + i) * LANES;
            const vector line = load(p->matrix, place, dtype);
            /* Matrices of small ranks end before the processor has seen where they lead. */
            __builtin_prefetch((const char *)p->matrix + (place + AHEAD) * (dtype == FLOAT32 ? 4 : 2));
            for (int r = 0; r < rows; r++) total[r][w] += p->x[r][i] * line;
        }
    for (int w = 0; w < width; w++) {
        const long column = (panel + w) * LANES;
        for (int r = 0; r < rows; r++) {
            if (!adds) store(p->out[r], column, total[r][w], FLOAT32);
            else if (column + LANES <= p->size)
                store(p->out[r], column, load(p->out[r], column, dtype) + p->scale * total[r][w], dtype);
            else
                for (long i = 0; i < p->size - column; i++)
                    put(p->out[r], column + i, get(p->out[r], column + i, dtype) + p->scale * total[r][w][i], dtype);
        }
    }
}

/* Few rows take many panels at once: a sum's next addition waits for its last one, so several must be under way. */
INLINE void multiply(const struct product *p, const int rows, const int adds, const int dtype) {
    const long panels = (p->size + LANES - 1) / LANES;
    const int width = rows == 1 ? 8 : rows <= 5 ? 4 : 2;
    long panel = 0;
    for (; panel + width <= panels; panel += width) multiply_panels(p, panel, rows, width, adds, dtype);
    for (; panel < panels; panel++) multiply_panels(p, panel, rows, 1, adds, dtype);
}

/* `scratch`: room for MAX_ROWS rows of x in float32 and of their products with A. */
INLINE void adapt_rows(void *y, const void *x, const int32_t *places, const struct lora *lora, long in, long out,
                       float *scratch, const int rows, const int dtype) {
    const long width = dtype == FLOAT32 ? 4 : 2;
    struct product down = {.matrix = lora->a, .depth = in, .size = lora->ranks};
    float *inner = scratch + MAX_ROWS * in;
    for (int r = 0; r < rows; r++) {
        const long first = places[r] * in;
        if (dtype == FLOAT32) down.x[r] = (const float *)x + first;
        else {
            for (long i = 0; i < in; i++) scratch[r * in + i] = get(x, first + i, dtype);
            down.x[r] = scratch + r * in;
        }
        down.out[r] = inner + r * lora->ranks;
    }
    multiply(&down, rows, 0, dtype);
    for (long number = 0; number < lora->parts; number++) {
        const struct lora_part *part = lora->part + number;
        struct product up = {.matrix = part->b, .depth = part->rank, .size = part->size, .scale = part->scale};
        for (int r = 0; r < rows; r++) {
            up.x[r] = inner + r * lora->ranks + part->first;
            up.out[r] = (char *)y + (places[r] * out + part->start) * width;
        }
        multiply(&up, rows, 1, dtype);
    }
}

#undef CASE
#define CASE(n) \
    case n: \
        adapt_rows(y, x, places, lora, in, out, scratch, n, dtype); \
        break;

INLINE void adapt_item(void *y, const void *x, const int32_t *places, int count, const struct lora *lora, long in,
                       long out, float *scratch, const int dtype) {
    switch (count) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
}

static void adapt_float32(void *y, const void *x, const int32_t *places, int count, const struct lora *lora, long in,
                          long out, float *scratch) {
    adapt_item(y, x, places, count, lora, in, out, scratch, FLOAT32);
}

static void adapt_bfloat16(void *y, const void *x, const int32_t *places, int count, const struct lora *lora, long in,
                           long out, float *scratch) {
    adapt_item(y, x, places, count, lora, in, out, scratch, BFLOAT16);
}

/* y [rows, out] += what adapters bring of x [rows, in], for the rows that items name. adapters: for each adapter its
 * products' struct lora, of which `number` is meant; `ranks`: the most that any of these has. Returns 0, or 1 when memory
 * ran out. */
int add_adapters(void *y, const void *x, const struct lora *const *adapters, long number, const int32_t *rows,
                 const struct lora_item *items, long count, long in, long out, long ranks, int dtype) {
    int failed = 0;
#pragma omp parallel
    {
        float *scratch = malloc(MAX_ROWS * (in + ranks) * sizeof(float));
        if (scratch == NULL) failed = 1;
#pragma omp for schedule(dynamic)
        for (long i = 0; i < count; i++) {
            const struct lora *lora = adapters[items[i].adapter] + number;
            if (scratch == NULL || lora->parts == 0) continue;
            (dtype == FLOAT32 ? adapt_float32 : adapt_bfloat16)(y, x, rows + items[i].first, items[i].count, lora, in,
                                                                out, scratch);
        }
        free(scratch);
    }
    return failed;
}
