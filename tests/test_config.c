/* test_config.c - configurations, presets, tensor lists, initial values, and what options are before they are given. */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include "../lib/options.h"
#include "../megalodon.h"
#include "test.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_TENSORS = 2000 };

static MegalodonTensor tensors[MAX_TENSORS];

/* ---- presets ---- */

/* The published sizes, written down here a second time. */
static const struct Published {
    const char *name;
    int L, D, H, Z, E, F, C, G;
    bool swiglu, tied;
    double rope_base;
    int64_t parameters;              /* with a vocabulary of 32000; 0: not published */
} published[] = {
    {"mega200M",      12, 1024, 1, 256,  2048, 2560,  2048, 32, false, false, 1e4, 220627968},
    {"mega1.3B",      24, 2048, 2, 512,  4096, 4864,  2048, 64, false, false, 1e4, 1342832640},
    {"mega1.3B_pg19", 24, 2048, 2, 512,  4096, 3584,  2048, 64, true,  true,  1e4, 1327628288},
    {"mega7.1B",      32, 4096, 4, 1024, 8192, 11264, 2048, 64, false, false, 1e4, 7117381632},
    {"mega7.3B",      32, 4096, 4, 1024, 8192, 8192,  4096, 64, true,  false, 1e5, 7385817088},
};

/* Counts parameters from the sizes alone, independently of the tensor list. */
static int64_t count_by_hand(const MegalodonConfig *c) {
    int64_t D = c->model_dim, Z = c->z_dim, E = c->value_dim, F = c->ffn_hidden_dim, N = c->cema_ndim;
    int64_t layer = 2 * D                            /* TimestepNorm */
                  + 4 * D * N + 2 * D                /* CEMA: alpha, delta, gamma (re, im); theta, omega */
                  + Z * D + Z + 4 * Z                /* wz; gamma and beta of q and k */
                  + 2 * (E * D + E)                  /* wv, wr */
                  + D * D + D + D * E                /* wh1, wh2 */
                  + (c->swiglu ? 3 : 2) * D * F;
    if (c->norm_affine) layer += 3 * D;
    if (c->rescale_nffn) layer += D;
    return c->num_layers * layer + 2 * D + (c->share_emb ? 1 : 2) * (int64_t)c->vocab_size * D;
}

static void check_presets(void) {
    for (size_t i = 0; i < sizeof published / sizeof *published; i++) {
        const struct Published *p = &published[i];
        MegalodonConfig c;
        const char *error = megalodon_preset(p->name, &c);
        if (!check(!error, "preset %s: %s", p->name, error)) continue;
        check(c.num_layers == p->L && c.model_dim == p->D && c.num_heads == p->H && c.z_dim == p->Z &&
              c.value_dim == p->E && c.ffn_hidden_dim == p->F && c.chunk_size == p->C && c.norm_num_groups == p->G &&
              c.cema_ndim == 16, "preset %s has other sizes than published", p->name);
        check(c.swiglu == p->swiglu && c.share_emb == p->tied && c.scale_emb == p->tied && !c.rescale_nffn &&
              c.norm_affine && c.norm_eps == 1e-5 && c.rope_base == p->rope_base,
              "preset %s has other options than published", p->name);
        c.vocab_size = 32000;
        long long ours = (long long)megalodon_num_parameters(&c);
        check(ours == (long long)p->parameters, "preset %s: %lld parameters, published %lld", p->name, ours,
              (long long)p->parameters);
    }
    int count = 0;
    for (const MegalodonPreset *p = megalodon_presets; p->name; p++, count++) {
        const char *error = megalodon_validate(&p->config);
        check(!error, "preset %s is not valid: %s", p->name, error ? error : "");
        check(p->meaning && *p->meaning, "preset %s says nothing of itself", p->name);
        check(megalodon_num_parameters(&p->config) == count_by_hand(&p->config),
              "preset %s: %lld parameters, by hand %lld", p->name, (long long)megalodon_num_parameters(&p->config),
              (long long)count_by_hand(&p->config));
    }
    check(count >= 6, "only %d presets", count);
    MegalodonConfig small, unknown;
    megalodon_default_config(&small);
    long long parameters = (long long)megalodon_num_parameters(&small);
    check(parameters > 12050000 && parameters < 12150000, "the default model has %lld parameters, not 12.1 M",
          parameters);
    MegalodonConfig bytes;
    check(!megalodon_preset("bytes12M", &bytes), "there is no preset bytes12M");
#define X(type, field, fallback, meaning) \
    check(bytes.field == small.field, "preset bytes12M and the default model differ in " #field);
    MEGALODON_CONFIG_FIELDS(X)
#undef X
    const char *error = megalodon_preset("mega9000", &unknown);
    check(error && strstr(error, "mega9000"), "an unknown preset is not named: %s", error ? error : "no error");
    for (const MegalodonPreset *p = megalodon_presets; p->name && error; p++)
        check(strstr(error, p->name) != NULL, "the error for an unknown preset does not offer %s", p->name);
}

/* ---- the validator ---- */

/* A change to the default configuration that makes it invalid, and what the message has to name. */
typedef struct Broken {
    const char *what;
    size_t offset;
    double value;
    const char *names[3];
} Broken;

/* Sets a field to a value, whatever its type. */
static void set_field(MegalodonConfig *config, size_t offset, double value) {
#define X(type, field, default_value, meaning) \
    if (offset == offsetof(MegalodonConfig, field)) config->field = (type)value;
    MEGALODON_CONFIG_FIELDS(X)
#undef X
}

static void check_broken(const Broken *b) {
    MegalodonConfig config;
    megalodon_default_config(&config);
    set_field(&config, b->offset, b->value);
    const char *error = megalodon_validate(&config);
    if (!check(error != NULL, "%s passes the validator", b->what)) return;
    for (int i = 0; i < 3 && b->names[i]; i++)
        check(strstr(error, b->names[i]) != NULL, "%s: the message does not name \"%s\": %s", b->what, b->names[i],
              error);
}

static void check_validator(void) {
    MegalodonConfig config;
    megalodon_default_config(&config);
    check(!megalodon_validate(&config), "the default configuration is not valid: %s", megalodon_validate(&config));
#define AT(field) offsetof(MegalodonConfig, field)
    const Broken broken[] = {
        {"D % G", AT(model_dim), 400, {"model_dim", "400", "32"}},
        {"D % G by G", AT(norm_num_groups), 7, {"norm_num_groups", "384", "7"}},
        {"more groups than features", AT(norm_num_groups), 385, {"norm_num_groups", "384", "385"}},
        {"Z % H", AT(num_heads), 5, {"num_heads", "96", "5"}},
        {"Z < H", AT(num_heads), 128, {"num_heads", "96", "128"}},
        {"z odd", AT(z_dim), 97, {"z_dim", "97", NULL}},
        {"z odd by H", AT(num_heads), 32, {"num_heads", "96", "32"}},
        {"dropout 1", AT(dropout), 1, {"dropout", "1", NULL}},
        {"dropout negative", AT(dropout), -0.25, {"dropout", "-0.25", NULL}},
        {"hidden_dropout 2", AT(hidden_dropout), 2, {"hidden_dropout", "2", NULL}},
        {"attention_dropout 1.5", AT(attention_dropout), 1.5, {"attention_dropout", "1.5", NULL}},
        {"dropout NaN", AT(dropout), NAN, {"dropout", "nan", NULL}},
        {"eps 0", AT(norm_eps), 0, {"norm_eps", "0", NULL}},
        {"eps negative", AT(norm_eps), -1e-5, {"norm_eps", "-1e-05", NULL}},
        {"eps NaN", AT(norm_eps), NAN, {"norm_eps", "nan", NULL}},
        {"eps infinite", AT(norm_eps), INFINITY, {"norm_eps", "inf", NULL}},
        {"rope_base 0", AT(rope_base), 0, {"rope_base", "0", NULL}},
        {"rope_base negative", AT(rope_base), -10, {"rope_base", "-10", NULL}},
        {"rope_base infinite", AT(rope_base), INFINITY, {"rope_base", "inf", NULL}},
    };
#undef AT
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) check_broken(&broken[i]);
    /* E % H where Z % H holds. */
    config.num_heads = 3;
    config.value_dim = 770;
    const char *error = megalodon_validate(&config);
    check(error && strstr(error, "770") && strstr(error, "3") && strstr(error, "value_dim"),
          "E %% H is not named: %s", error ? error : "no error");
    /* Every whole number must be at least 1. */
    static const double wrong[] = {0, -1, -2147483648.};
#define X(type, field, default_value, meaning)                                                                   \
    for (size_t i = 0; i < 3 && !strcmp(#type, "int"); i++) {                                                    \
        char number[32];                                                                                         \
        snprintf(number, sizeof number, "%.0f", wrong[i]);                                                       \
        check_broken(&(Broken){#field, offsetof(MegalodonConfig, field), wrong[i], {#field, number, NULL}});     \
    }
    MEGALODON_CONFIG_FIELDS(X)
#undef X
}

/* ---- tensor lists ---- */

static int list(const MegalodonConfig *config, MegalodonKind kind, int B, int T, int n) {
    return megalodon_tensors(config, kind, B, T, n, tensors, MAX_TENSORS);
}

/* Checks one tensor's shape by name; ndim 0: it must not exist. */
static void check_tensor(const MegalodonConfig *config, MegalodonKind kind, const char *name, int ndim, int64_t d0,
                         int64_t d1, int64_t d2, int64_t d3) {
    MegalodonTensor t;
    int64_t want[4] = {d0, d1, d2, d3}, size = 1;
    const char *error = megalodon_find_tensor(config, kind, 3, 11, 5, name, &t);
    if (ndim == 0) {
        check(error && strstr(error, name), "%s should be unknown, and named: %s", name, error ? error : "no error");
        return;
    }
    if (!check(!error, "%s: %s", name, error)) return;
    check(t.ndim == ndim && !strcmp(t.name, name), "%s: %d dimensions, not %d", name, t.ndim, ndim);
    for (int i = 0; i < ndim; i++) {
        size *= want[i];
        check(t.dims[i] == want[i], "%s: dimension %d is %lld, not %lld", name, i, (long long)t.dims[i],
              (long long)want[i]);
    }
    check(t.size == size, "%s: size %lld, not %lld", name, (long long)t.size, (long long)size);
}

static void check_lists(void) {
    MegalodonConfig c;
    megalodon_default_config(&c);
    int D = c.model_dim, N = c.cema_ndim, Z = c.z_dim, E = c.value_dim, F = c.ffn_hidden_dim, V = c.vocab_size;
    int G = c.norm_num_groups;
    c.num_heads = 2;
    /* Every combination of the five options: sizes add up, no name comes twice, presence follows the option. */
    for (int bits = 0; bits < 16; bits++) {
        c.swiglu = bits & 1;
        c.rescale_nffn = bits & 2;
        c.share_emb = bits & 4;
        c.norm_affine = bits & 8;
        int count = list(&c, MEGALODON_PARAM, 1, 1, 0), twice = 0;
        int64_t sum = 0;
        for (int i = 0; i < count; i++) {
            sum += tensors[i].size;
            for (int j = 0; j < i; j++) twice += !strcmp(tensors[i].name, tensors[j].name);
        }
        check(twice == 0, "options %d: %d names come twice", bits, twice);
        check(sum == megalodon_num_parameters(&c) && sum == count_by_hand(&c), "options %d: %lld parameters listed",
              bits, (long long)sum);
        check(megalodon_tensors(&c, MEGALODON_PARAM, 1, 1, 0, NULL, 0) == count, "options %d: counting differs", bits);
        check_tensor(&c, MEGALODON_PARAM, "layers.5.nffn.fc3.weight", c.swiglu ? 2 : 0, F, D, 1, 1);
        check_tensor(&c, MEGALODON_PARAM, "layers.0.nffn.alpha", c.rescale_nffn ? 1 : 0, D, 1, 1, 1);
        check_tensor(&c, MEGALODON_PARAM, "output.output.weight", c.share_emb ? 0 : 2, V, D, 1, 1);
        check_tensor(&c, MEGALODON_PARAM, "layers.1.mega.rmsnorm.weight", c.norm_affine ? 1 : 0, D, 1, 1, 1);
        check_tensor(&c, MEGALODON_PARAM, "layers.1.nffn.norm.bias", c.norm_affine ? 1 : 0, D, 1, 1, 1);
    }
    check_tensor(&c, MEGALODON_PARAM, "embed.weight", 2, V, D, 1, 1);
    check_tensor(&c, MEGALODON_PARAM, "layers.2.mega.cema.alpha", 3, D, N, 1, 1);
    check_tensor(&c, MEGALODON_PARAM, "layers.2.mega.cema.theta", 3, D, 1, 1, 1);
    check_tensor(&c, MEGALODON_PARAM, "layers.2.mega.cema.gamma", 3, D, N, 2, 1);
    check_tensor(&c, MEGALODON_PARAM, "layers.2.mega.cema.omega", 2, D, 1, 1, 1);
    check_tensor(&c, MEGALODON_PARAM, "layers.2.mega.wz.weight", 2, Z, D, 1, 1);
    check_tensor(&c, MEGALODON_PARAM, "layers.2.mega.gamma", 2, 2, Z, 1, 1);
    check_tensor(&c, MEGALODON_PARAM, "layers.2.mega.wh2.weight", 2, D, E, 1, 1);
    check_tensor(&c, MEGALODON_PARAM, "layers.6.mega.wh2.weight", 0, 0, 0, 0, 0);
    check_tensor(&c, MEGALODON_PARAM, "layers.-1.mega.gamma", 0, 0, 0, 0, 0);
    check_tensor(&c, MEGALODON_PARAM, "nonsense", 0, 0, 0, 0, 0);
    check_tensor(&c, MEGALODON_MOMENT1, "layers.2.mega.gamma", 2, 2, Z, 1, 1);
    /* Activations and state with B = 3, T = 11, n = 5. */
    check_tensor(&c, MEGALODON_ACT, "layers.0.timenorm.mean", 3, 3, 11, G, 1);
    check_tensor(&c, MEGALODON_ACT, "layers.0.q", 4, 3, 11, 2, Z / 2);
    check_tensor(&c, MEGALODON_ACT, "layers.0.v", 4, 3, 11, 2, E / 2);
    check_tensor(&c, MEGALODON_ACT, "layers.0.block", 3, 3, 11, D, 1);
    check_tensor(&c, MEGALODON_ACT, "logits", 3, 3, 11, V, 1);
    check_tensor(&c, MEGALODON_ACT, "nll", 2, 3, 11, 1, 1);
    check_tensor(&c, MEGALODON_STATE, "count", 1, 3, 1, 1, 1);
    check_tensor(&c, MEGALODON_STATE, "layers.1.cema", 4, 3, D, N, 2);
    check_tensor(&c, MEGALODON_STATE, "layers.1.k", 4, 3, 5, 2, Z / 2);
    check_tensor(&c, MEGALODON_STATE, "layers.1.v", 4, 3, 5, 2, E / 2);
    check_tensor(&c, MEGALODON_STATE, "layers.1.norm.var", 2, 3, G, 1, 1);
    check_tensor(&c, MEGALODON_STATE, "final_norm.mean", 2, 3, G, 1, 1);
    /* The table of components can be read: every shape has known letters, every list ends. */
    for (int i = 0; i < MEGALODON_NUM_COMPONENTS; i++) {
        const MegalodonComponent *component = &megalodon_components[i];
        check(component->name != NULL, "component %d has no name", i);
        int args = 0;
        for (; args < MEGALODON_MAX_ARGS && component->args[args].name; args++) {
            int64_t dims[MEGALODON_MAX_DIMS];
            int ndim = megalodon_shape(component->args[args].shape, &c, 3, 11, 5, dims);
            check(ndim >= 1 && ndim <= MEGALODON_MAX_DIMS, "%s %s has %d dimensions", component->name,
                  component->args[args].name, ndim);
        }
        check(args >= 2, "%s has %d arguments", component->name, args);
    }
}

/* ---- initial values ---- */

typedef struct Moments { double mean, std, smallest, largest; } Moments;

static Moments moments(const float *x, int64_t n, int64_t stride) {
    Moments m = {0, 0, INFINITY, -INFINITY};
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += stride, count++) {
        m.mean += x[i];
        m.smallest = fmin(m.smallest, x[i]);
        m.largest = fmax(m.largest, x[i]);
    }
    m.mean /= (double)count;
    for (int64_t i = 0; i < n; i += stride) m.std += (x[i] - m.mean) * (x[i] - m.mean);
    m.std = sqrt(m.std / (double)count);
    return m;
}

/* Mean 0 and this std, within five standard deviations of what a sample of this size scatters. */
static void check_normal(const char *name, const float *x, int64_t n, int64_t stride, double std) {
    Moments m = moments(x, n, stride);
    double count = (double)(n / stride);
    check(fabs(m.mean) < 5 * std / sqrt(count), "%s: mean %g", name, m.mean);
    check(fabs(m.std / std - 1) < 5 / sqrt(2 * count), "%s: std %g, not %g", name, m.std, std);
}

static int compare_floats(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* theta is logit(D^(-i/D)), i = 1..D, in one random order. i = D gives 1/D. */
static void check_theta(const char *name, const float *x, int D) {
    float *sorted = malloc((size_t)D * sizeof *sorted);
    if (!sorted) exit(1);
    memcpy(sorted, x, (size_t)D * sizeof *sorted);
    qsort(sorted, (size_t)D, sizeof *sorted, compare_floats);
    int wrong = 0, in_place = 0;
    for (int i = 1; i <= D; i++) {
        double f = exp(-log(D) * i / D), want = log(f / (1 - f));
        if (!(fabs(sorted[D - i] - want) <= 1e-5 * fmax(1, fabs(want)))) wrong++;
        if (fabs(x[i - 1] - want) <= 1e-5 || fabs(x[D - i] - want) <= 1e-5) in_place++;
    }
    check(wrong == 0, "%s: %d of %d values are not a permutation of logit(D^(-i/D))", name, wrong, D);
    check(in_place < D / 4, "%s: %d of %d values are in order: not a random one", name, in_place, D);
    free(sorted);
}

static void check_initial_value(const MegalodonConfig *c, const MegalodonTensor *t, const float *x) {
    double D = c->model_dim;
    Moments m = moments(x, t->size, 1);
    switch (t->init) {
    case MEGALODON_INIT_ZERO:
        check(m.smallest == 0 && m.largest == 0, "%s is not 0", t->name);
        break;
    case MEGALODON_INIT_HE:
        check_normal(t->name, x, t->size, 1, 1 / sqrt(3. * (double)t->dims[t->ndim - 1]));
        check(m.largest > 3.5 * m.std, "%s is truncated", t->name);
        break;
    case MEGALODON_INIT_EMBED:
        /* Cutting a normal at three standard deviations leaves a standard deviation of 0.98658. */
        check_normal(t->name, x, t->size, 1, 0.98658 / sqrt(D));
        check(m.largest <= 3.000001 / sqrt(D) && m.smallest >= -3.000001 / sqrt(D), "%s is not truncated", t->name);
        check(m.largest > 2.9 / sqrt(D), "%s: largest %g", t->name, m.largest * sqrt(D));
        break;
    case MEGALODON_INIT_CEMA: check_normal(t->name, x, t->size, 1, 0.2); break;
    case MEGALODON_INIT_CEMA_THETA: check_theta(t->name, x, c->model_dim); break;
    case MEGALODON_INIT_CEMA_GAMMA: {
        check_normal(t->name, x, t->size, 2, 1);
        Moments imaginary = moments(x + 1, t->size - 1, 2);
        check(imaginary.smallest == 0 && imaginary.largest == 0, "%s: imaginary part is not 0", t->name);
        break;
    }
    case MEGALODON_INIT_CEMA_OMEGA:
        check_normal(t->name, x, t->size, 1, 0.25);
        check(m.largest <= 1 && m.smallest >= -1, "%s is not truncated", t->name);
        break;
    case MEGALODON_INIT_RESCALE:
        for (int64_t i = 0; i < t->size; i++)
            if (x[i] != (float)(0.1 * pow(0.5, t->layer)) && test.failed < TEST_MAX_SHOWN)
                check(false, "%s: %g", t->name, x[i]);
        break;
    }
}

static void check_initial_values(void) {
    MegalodonConfig c;
    megalodon_default_config(&c);
    c.rescale_nffn = true;
    int count = list(&c, MEGALODON_PARAM, 1, 1, 0);
    int64_t largest = 0;
    for (int i = 0; i < count; i++) if (tensors[i].size > largest) largest = tensors[i].size;
    float *x = malloc((size_t)largest * sizeof *x), *y = malloc((size_t)largest * sizeof *y);
    if (!x || !y) exit(1);
    for (int i = 0; i < count; i++) {
        const MegalodonTensor *t = &tensors[i];
        size_t bytes = (size_t)t->size * sizeof *x;
        megalodon_initial_values(&c, t, 1, x);
        check_initial_value(&c, t, x);
        megalodon_initial_values(&c, t, 1, y);
        check(!memcmp(x, y, bytes), "%s: the same seed gives other values", t->name);
        if (t->init == MEGALODON_INIT_ZERO || t->init == MEGALODON_INIT_RESCALE) continue;
        megalodon_initial_values(&c, t, 2, y);
        check(memcmp(x, y, bytes) != 0, "%s: another seed gives the same values", t->name);
        /* The next layer's tensor of the same kind draws other numbers. */
        for (int j = i + 1; j < count; j++) {
            const char *a = strstr(t->name, "mega."), *b = strstr(tensors[j].name, "mega.");
            if (!a || !b || strcmp(a, b)) continue;
            megalodon_initial_values(&c, &tensors[j], 1, y);
            check(memcmp(x, y, bytes) != 0, "%s and %s are equal", t->name, tensors[j].name);
            break;
        }
    }
    free(x);
    free(y);
}

/* omega is cut at four standard deviations, which one number of 16,000 passes: more of them than a small model has. */
static void check_wide_omega(void) {
    MegalodonConfig c;
    MegalodonTensor omega;
    megalodon_default_config(&c);
    c.model_dim = 1 << 20;
    const char *error = megalodon_find_tensor(&c, MEGALODON_PARAM, 1, 1, 0, "layers.0.mega.cema.omega", &omega);
    check(!error, "%s", error ? error : "");
    float *x = malloc((size_t)omega.size * sizeof *x);
    if (!x) exit(1);
    megalodon_initial_values(&c, &omega, 1, x);
    check_initial_value(&c, &omega, x);
    Moments m = moments(x, omega.size, 1);
    check(m.largest > 0.95 && m.smallest < -0.95, "omega lies between %g and %g", m.smallest, m.largest);
    free(x);
}

/* ---- dropout ---- */

/* y = x / (1-p), or 0 where the generator says so: by the words of megalodon.h. And the backward has the same mask. */
static void check_dropout(void) {
    enum { B = 2, T = 50 };
    MegalodonShape shape = {.B = B, .T = T, .key = megalodon_dropout_key(7, 3, 1, MEGALODON_SITE_M)};
    megalodon_default_config(&shape.config);
    int64_t size = (int64_t)B * T * shape.config.model_dim;
    float *x = malloc((size_t)size * sizeof *x), *y = malloc((size_t)size * sizeof *y);
    if (!x || !y) exit(1);
    for (int64_t i = 0; i < size; i++) x[i] = 1 + (float)(i % 7);
    const double p[] = {0, 0.1, 0.25, 0.5, 0.9};
    for (size_t at = 0; at < sizeof p / sizeof *p; at++) {
        shape.config.dropout = p[at];
        void *args[] = {y, x};
        for (int backward = 0; backward < 2; backward++) {
            memset(y, 0xff, (size_t)size * sizeof *y);
            if (backward) megalodon_cpu.components[MEGALODON_DROPOUT].backward((void *[]){x, y}, args, &shape);
            else megalodon_cpu.components[MEGALODON_DROPOUT].forward(args, &shape);
            int64_t wrong = 0, dropped = 0;
            for (int64_t i = 0; i < size; i++) {
                bool out = (double)(megalodon_random(shape.key, (uint64_t)i) >> 40) < floor(p[at] * (1 << 24));
                double want = out ? 0 : x[i] / (1 - p[at]);
                if (!(fabs(y[i] - want) <= 1e-6 * want)) wrong++;
                if (out) dropped++;
            }
            check(wrong == 0, "dropout %g, %s: %lld of %lld elements are wrong", p[at], backward ? "backward" : "forward",
                  (long long)wrong, (long long)size);
            double share = (double)dropped / (double)size, deviation = sqrt(p[at] * (1 - p[at]) / (double)size);
            check(fabs(share - p[at]) <= 5 * deviation, "dropout %g drops %g of all elements", p[at], share);
        }
    }
    free(x);
    free(y);
}

/* The weight of key j for query t has the index ((b H + h) T + t) C + j, j counted from the start of the chunk. Queries
 * of 0 give equal weights, and values that are unit vectors show each of them. */
static void check_attention_dropout(void) {
    enum { B = 2, T = 9, H = 2, C = 6, n = 2, PAIR = 2 };       /* keys of two entries; values of C */
    MegalodonShape shape = {.B = B, .T = T, .n = n, .key = megalodon_dropout_key(7, 3, 1, MEGALODON_SITE_ATTENTION)};
    float a[B][T][H][C], lse[B][T][H], q[B][T][H][PAIR] = {0}, k[B][T][H][PAIR] = {0}, v[B][T][H][C] = {0};
    float k_in[B][n][H][PAIR] = {0}, v_in[B][n][H][C] = {0};
    const double p = 0.4;
    megalodon_default_config(&shape.config);
    shape.config.num_heads = H;
    shape.config.z_dim = H * PAIR;
    shape.config.value_dim = H * C;
    shape.config.chunk_size = C;
    shape.config.attention_dropout = p;
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++) {
            for (int t = 0; t < T; t++) v[b][t][h][(n + t) % C] = 1;
            for (int t = 0; t < n; t++) v_in[b][t][h][t] = 1;
        }
    memset(a, 0xff, sizeof a);
    megalodon_cpu.components[MEGALODON_ATTENTION].forward((void *[]){a, lse, q, k, v, k_in, v_in}, &shape);
    int wrong = 0;
    for (int i = 0; i < B * T * H * C; i++) {
        int j = i % C, h = i / C % H, t = i / C / H % T, b = i / C / H / T, place = (n + t) % C;
        uint64_t index = (uint64_t)(((b * H + h) * T + t) * C + j);
        bool kept = (double)(megalodon_random(shape.key, index) >> 40) >= floor(p * (1 << 24));
        double want = j <= place && kept ? 1 / (1 - p) / (place + 1) : 0;
        if (!(fabs(a[b][t][h][j] - want) <= 1e-6)) wrong++;
    }
    check(wrong == 0, "dropout in attention: %d of %d weights are wrong", wrong, B * T * H * C);
}

/* ---- the generator ---- */

static void check_random(void) {
    enum { DRAWS = 1 << 16 };
    int ones[64] = {0}, flips[64] = {0};
    for (uint64_t i = 0; i < DRAWS; i++) {
        uint64_t bits = megalodon_random(42, i), next = bits ^ megalodon_random(42, i + 1);
        for (int b = 0; b < 64; b++) {
            ones[b] += (int)(bits >> b & 1);
            flips[b] += (int)(next >> b & 1);
        }
    }
    /* Each bit is one half of the time, and changes half of the time; 5 sigma are 2.5 sqrt(draws). */
    for (int b = 0; b < 64; b++) {
        check(abs(ones[b] - DRAWS / 2) < 2.5 * sqrt(DRAWS), "bit %d is one %d times of %d", b, ones[b], DRAWS);
        check(abs(flips[b] - DRAWS / 2) < 2.5 * sqrt(DRAWS), "bit %d changes %d times of %d", b, flips[b], DRAWS);
    }
    /* Different in each of its arguments. */
    uint64_t key = megalodon_dropout_key(1, 2, 3, MEGALODON_SITE_M);
    check(key == megalodon_dropout_key(1, 2, 3, MEGALODON_SITE_M), "a dropout key changes");
    check(key != megalodon_dropout_key(2, 2, 3, MEGALODON_SITE_M), "a dropout key ignores the seed");
    check(key != megalodon_dropout_key(1, 3, 3, MEGALODON_SITE_M), "a dropout key ignores the step");
    check(key != megalodon_dropout_key(1, 2, 4, MEGALODON_SITE_M), "a dropout key ignores the layer");
    check(key != megalodon_dropout_key(1, 2, 3, MEGALODON_SITE_H), "a dropout key ignores the site");
    check(key != megalodon_dropout_key(2, 1, 3, MEGALODON_SITE_M), "seed and step can be exchanged");
}

/* ---- options ---- */

#define TEST_OPTIONS(X)                                                           \
    X(INT,    rows,   NULL,   1, 10, "N",    "Test", "no default")                \
    X(LONG,   steps,  NULL,   1, 10, "N",    "Test", "no default")                \
    X(REAL,   rate,   NULL,   1, 10, "X",    "Test", "no default")                \
    X(BOOL,   carry,  NULL,   0, 0,  "BOOL", "Test", "no default")                \
    X(FLAG,   quick,  NULL,   0, 0,  "",     "Test", "no default")                \
    X(CHOICE, device, NULL,   0, 0,  "a|b",  "Test", "no default")                \
    X(TEXT,   data,   NULL,   0, 0,  "PATH", "Test", "no default")                \
    X(INT,    depth,  "7",    1, 10, "N",    "Test", "a default")                 \
    X(TEXT,   name,   "here", 0, 0,  "NAME", "Test", "a default")
typedef struct Values { TEST_OPTIONS(OPTION_MEMBER) } Values;

/* Whatever lies in the struct before: without a default and without being given, a value is 0, false or NULL. */
static void check_options(void) {
    static const Option table[] = { TEST_OPTIONS(OPTION_ROW) };
    static OptionSet set;
    Values v;
    memset(&v, 0xA5, sizeof v);
    options_init(&set, "test", "[options]", "Is never read.");
    options_add(&set, table, OPTION_COUNT(table), &v);
    check(v.rows == 0 && v.steps == 0 && v.rate == 0 && !v.carry && !v.quick && !v.device && !v.data,
          "an option without a default is not empty before it is given");
    check(v.depth == 7 && strcmp(v.name, "here") == 0, "the defaults are %d and %s", v.depth, v.name);
}

int main(void) {
    test_begin("config");
    check_options();
    check_presets();
    check_validator();
    check_lists();
    check_initial_values();
    check_wide_omega();
    check_dropout();
    check_attention_dropout();
    check_random();
    return test_end();
}
