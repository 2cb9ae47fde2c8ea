/* megalodon.h - the contract between the model, the programs and the backends.
 *
 * Megalodon (arXiv 2404.08801) is a language model of unlimited context. This header is all that train.c and
 * generate.c know of it: a configuration, the lists of its tensors, and a table of functions that a backend
 * fills in (megalodon.c: the CPU reference, megalodon.cu: CUDA). Nothing here depends on a backend, and
 * several backends can live in one process.
 *
 * Letters used for shapes, here and everywhere:
 *   B batch   T time   D model_dim   N cema_ndim   H num_heads   Z z_dim (z = Z/H a head)
 *   E value_dim (e = E/H a head)   F ffn_hidden_dim   G norm_num_groups   C chunk_size   L num_layers
 *   V vocab_size   n tokens already in the unfinished chunk, 0 <= n < C
 * Tensors are dense, row-major, last letter fastest. "B,T,D" is [b][t][d].
 *
 * Errors: a function that can fail returns NULL when it worked and otherwise one sentence saying what was
 * wrong. The sentence stays valid until the next call that fails in the same thread.
 */
#ifndef MEGALODON_H
#define MEGALODON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ----------------------------------------------------------------------------------------------------
 * 1. Configuration: what fixes a model. Each field is declared once; JSON, --help, validation and tests
 * follow.
 */

/*        type    field              default  meaning */
#define MEGALODON_CONFIG_FIELDS(X)                                                                   \
    X(int,    num_layers,        6,       "L: number of blocks")                                     \
    X(int,    model_dim,         384,     "D: width of the residual stream")                         \
    X(int,    num_heads,         1,       "H: attention heads")                                      \
    X(int,    z_dim,             96,      "Z: width of queries and keys, all heads together")        \
    X(int,    value_dim,         768,     "E: width of values, all heads together")                  \
    X(int,    ffn_hidden_dim,    768,     "F: width of the feed-forward layer")                      \
    X(int,    cema_ndim,         16,      "N: complex states a channel in the moving average")       \
    X(int,    chunk_size,        512,     "C: attention looks back to the start of its chunk")       \
    X(int,    norm_num_groups,   32,      "G: groups of features in TimestepNorm")                   \
    X(int,    vocab_size,        256,     "V: number of tokens")                                     \
    X(bool,   swiglu,            true,    "gate the feed-forward layer (three matrices, not two)")   \
    X(bool,   rescale_nffn,      false,   "scale the feed-forward output by a learned vector")       \
    X(bool,   scale_emb,         false,   "multiply embeddings by sqrt(D)")                          \
    X(bool,   share_emb,         false,   "tie the output matrix to the embedding")                  \
    X(bool,   norm_affine,       true,    "learned weights in RMSNorm and LayerNorm")                \
    X(double, norm_eps,          1e-5,    "epsilon of every norm")                                   \
    X(double, rope_base,         100000., "base of the rotary embedding")                            \
    X(double, dropout,           0.,      "dropout on the embedding and on both branches")           \
    X(double, hidden_dropout,    0.,      "dropout on m, on the gated attention, on the FFN hidden") \
    X(double, attention_dropout, 0.,      "dropout on the attention weights")

typedef struct MegalodonConfig {
#define X(type, field, default_value, meaning) type field;
    MEGALODON_CONFIG_FIELDS(X)
#undef X
} MegalodonConfig;

typedef struct MegalodonPreset {
    const char *name, *meaning;
    MegalodonConfig config;
} MegalodonPreset;

/* All presets; the last entry has name NULL. The first is the default of the programs. */
extern const MegalodonPreset megalodon_presets[];

/* Fills the defaults above. */
void megalodon_default_config(MegalodonConfig *config);
/* Finds a preset by name. Error: the unknown name and the list of known ones. */
const char *megalodon_preset(const char *name, MegalodonConfig *config);
/* Checks every relation between the sizes. Error: the violated relation with both numbers. */
const char *megalodon_validate(const MegalodonConfig *config);
/* Number of parameters; needs a valid configuration. */
int64_t megalodon_num_parameters(const MegalodonConfig *config);

/* ----------------------------------------------------------------------------------------------------
 * 2. Tensors: the one list of parameters, activations and state. Names are those of the released
 * implementation.
 */

typedef enum { MEGALODON_ALWAYS, MEGALODON_IF_AFFINE, MEGALODON_IF_SWIGLU, MEGALODON_IF_RESCALE,
               MEGALODON_IF_UNTIED } MegalodonPresence;

typedef enum {
    MEGALODON_INIT_ZERO,        /* 0                                                        */
    MEGALODON_INIT_HE,          /* normal, std 1/sqrt(3 fan_in); fan_in is the last dimension */
    MEGALODON_INIT_EMBED,       /* normal truncated at 3 std, std 1/sqrt(D)                 */
    MEGALODON_INIT_CEMA,        /* normal, std 0.2                                          */
    MEGALODON_INIT_CEMA_THETA,  /* logit(D^(-i/D)), i = 1..D, in one random order           */
    MEGALODON_INIT_CEMA_GAMMA,  /* real part normal std 1, imaginary part 0                 */
    MEGALODON_INIT_CEMA_OMEGA,  /* normal std 0.25 truncated to [-1, 1]                     */
    MEGALODON_INIT_RESCALE      /* 0.1 * 0.5^layer                                          */
} MegalodonInit;

/* Parameters of one block, in graph order. "layers.{i}." stands before each name.
 *    field             name                      shape     init                       present            */
#define MEGALODON_LAYER_PARAMS(X)                                                                           \
    X(timenorm_weight, "mega.timenorm.weight",   "D",      MEGALODON_INIT_ZERO,       MEGALODON_ALWAYS)     \
    X(timenorm_bias,   "mega.timenorm.bias",     "D",      MEGALODON_INIT_ZERO,       MEGALODON_ALWAYS)     \
    X(cema_alpha,      "mega.cema.alpha",        "D,N,1",  MEGALODON_INIT_CEMA,       MEGALODON_ALWAYS)     \
    X(cema_delta,      "mega.cema.delta",        "D,N,1",  MEGALODON_INIT_CEMA,       MEGALODON_ALWAYS)     \
    X(cema_theta,      "mega.cema.theta",        "D,1,1",  MEGALODON_INIT_CEMA_THETA, MEGALODON_ALWAYS)     \
    X(cema_gamma,      "mega.cema.gamma",        "D,N,2",  MEGALODON_INIT_CEMA_GAMMA, MEGALODON_ALWAYS)     \
    X(cema_omega,      "mega.cema.omega",        "D,1",    MEGALODON_INIT_CEMA_OMEGA, MEGALODON_ALWAYS)     \
    X(rmsnorm_weight,  "mega.rmsnorm.weight",    "D",      MEGALODON_INIT_ZERO,       MEGALODON_IF_AFFINE)  \
    X(wz_weight,       "mega.wz.weight",         "Z,D",    MEGALODON_INIT_HE,         MEGALODON_ALWAYS)     \
    X(wz_bias,         "mega.wz.bias",           "Z",      MEGALODON_INIT_ZERO,       MEGALODON_ALWAYS)     \
    X(gamma,           "mega.gamma",             "2,Z",    MEGALODON_INIT_ZERO,       MEGALODON_ALWAYS)     \
    X(beta,            "mega.beta",              "2,Z",    MEGALODON_INIT_ZERO,       MEGALODON_ALWAYS)     \
    X(wv_weight,       "mega.wv.weight",         "E,D",    MEGALODON_INIT_HE,         MEGALODON_ALWAYS)     \
    X(wv_bias,         "mega.wv.bias",           "E",      MEGALODON_INIT_ZERO,       MEGALODON_ALWAYS)     \
    X(wr_weight,       "mega.wr.weight",         "E,D",    MEGALODON_INIT_HE,         MEGALODON_ALWAYS)     \
    X(wr_bias,         "mega.wr.bias",           "E",      MEGALODON_INIT_ZERO,       MEGALODON_ALWAYS)     \
    X(wh1_weight,      "mega.wh1.weight",        "D,D",    MEGALODON_INIT_HE,         MEGALODON_ALWAYS)     \
    X(wh1_bias,        "mega.wh1.bias",          "D",      MEGALODON_INIT_ZERO,       MEGALODON_ALWAYS)     \
    X(wh2_weight,      "mega.wh2.weight",        "D,E",    MEGALODON_INIT_HE,         MEGALODON_ALWAYS)     \
    X(ffnnorm_weight,  "nffn.norm.weight",       "D",      MEGALODON_INIT_ZERO,       MEGALODON_IF_AFFINE)  \
    X(ffnnorm_bias,    "nffn.norm.bias",         "D",      MEGALODON_INIT_ZERO,       MEGALODON_IF_AFFINE)  \
    X(fc1_weight,      "nffn.fc1.weight",        "F,D",    MEGALODON_INIT_HE,         MEGALODON_ALWAYS)     \
    X(fc3_weight,      "nffn.fc3.weight",        "F,D",    MEGALODON_INIT_HE,         MEGALODON_IF_SWIGLU)  \
    X(fc2_weight,      "nffn.fc2.weight",        "D,F",    MEGALODON_INIT_HE,         MEGALODON_ALWAYS)     \
    X(ffn_alpha,       "nffn.alpha",             "D",      MEGALODON_INIT_RESCALE,    MEGALODON_IF_RESCALE)

/* Parameters outside the blocks. */
#define MEGALODON_MODEL_PARAMS(X)                                                                           \
    X(embed_weight,    "embed.weight",             "V,D",  MEGALODON_INIT_EMBED,      MEGALODON_ALWAYS)     \
    X(final_weight,    "output.final_norm.weight", "D",    MEGALODON_INIT_ZERO,       MEGALODON_ALWAYS)     \
    X(final_bias,      "output.final_norm.bias",   "D",    MEGALODON_INIT_ZERO,       MEGALODON_ALWAYS)     \
    X(output_weight,   "output.output.weight",     "V,D",  MEGALODON_INIT_EMBED,      MEGALODON_IF_UNTIED)

/* Activations of one block, in graph order; "layers.{i}." stands before each name. SAVED ones are kept for
 * the backward, CHEAP ones are recomputed by it from SAVED ones (elementwise work only) and share one
 * buffer between the layers, unless the model was created with keep_activations. A backend may keep some of
 * these where there is memory, which saves time and changes no result.
 *    field    name             shape       kept   present           what                                           */
#define MEGALODON_LAYER_ACTS(X)                                                                                     \
    X(mean,   "timenorm.mean", "B,T,G",    SAVED, MEGALODON_ALWAYS)    /* cumulative mean                        */ \
    X(var,    "timenorm.var",  "B,T,G",    SAVED, MEGALODON_ALWAYS)    /* cumulative population variance         */ \
    X(u,      "timenorm",      "B,T,D",    CHEAP, MEGALODON_ALWAYS)    /* TimestepNorm(x)                        */ \
    X(c,      "cema",          "B,T,D",    SAVED, MEGALODON_ALWAYS)    /* CEMA(u)                                */ \
    X(c_rstd, "rmsnorm.rstd",  "B,T",      SAVED, MEGALODON_ALWAYS)    /* 1/sqrt(mean c^2 + eps)                 */ \
    X(m,      "rmsnorm",       "B,T,D",    CHEAP, MEGALODON_ALWAYS)    /* RMSNorm(c), hidden_dropout             */ \
    X(zz,     "z_linear",      "B,T,Z",    SAVED, MEGALODON_ALWAYS)    /* m Wz^T + bz                            */ \
    X(zn,     "z",             "B,T,Z",    CHEAP, MEGALODON_ALWAYS)    /* zz normalised head by head             */ \
    X(q,      "q",             "B,T,H,z",  SAVED, MEGALODON_ALWAYS)    /* queries after the affine and RoPE      */ \
    X(k,      "k",             "B,T,H,z",  SAVED, MEGALODON_ALWAYS)    /* keys after the affine and RoPE         */ \
    X(vv,     "v_linear",      "B,T,E",    SAVED, MEGALODON_ALWAYS)    /* u Wv^T + bv                            */ \
    X(v,      "v",             "B,T,H,e",  CHEAP, MEGALODON_ALWAYS)    /* silu(vv)                               */ \
    X(rr,     "r_linear",      "B,T,E",    SAVED, MEGALODON_ALWAYS)    /* m Wr^T + br                            */ \
    X(r,      "r",             "B,T,E",    CHEAP, MEGALODON_ALWAYS)    /* silu(rr)                               */ \
    X(lse,    "attn.lse",      "B,T,H",    SAVED, MEGALODON_ALWAYS)    /* log sum exp of a query's scores        */ \
    X(a,      "attn",          "B,T,E",    SAVED, MEGALODON_ALWAYS)    /* softmax(q k^T + mask) v                */ \
    X(ar,     "gated",         "B,T,E",    CHEAP, MEGALODON_ALWAYS)    /* a * r, hidden_dropout                  */ \
    X(y,      "mega",          "B,T,D",    SAVED, MEGALODON_ALWAYS)    /* first hop                              */ \
    X(y_mean, "nffn.norm.mean", "B,T",     SAVED, MEGALODON_ALWAYS)    /* mean over D                            */ \
    X(y_rstd, "nffn.norm.rstd", "B,T",     SAVED, MEGALODON_ALWAYS)    /* 1/sqrt(variance over D + eps)          */ \
    X(n,      "nffn.norm",     "B,T,D",    CHEAP, MEGALODON_ALWAYS)    /* LayerNorm(y)                           */ \
    X(f1,     "nffn.fc1",      "B,T,F",    SAVED, MEGALODON_ALWAYS)    /* n W1^T                                 */ \
    X(f3,     "nffn.fc3",      "B,T,F",    SAVED, MEGALODON_IF_SWIGLU) /* n W3^T                                 */ \
    X(hidden, "nffn.hidden",   "B,T,F",    CHEAP, MEGALODON_ALWAYS)    /* silu(f1) (* f3), hidden_dropout        */ \
    X(f2,     "nffn.fc2",      "B,T,D",    SAVED, MEGALODON_IF_RESCALE) /* fc2(hidden), dropout: before alpha     */ \
    X(out,    "block",         "B,T,D",    SAVED, MEGALODON_ALWAYS)    /* second hop: the block's output         */

/* Activations outside the blocks. LOGITS are held for a few rows at a time unless keep_activations. */
#define MEGALODON_MODEL_ACTS(X)                                                                                     \
    X(embed,      "embed",           "B,T,D", SAVED, MEGALODON_ALWAYS)                                              \
    X(final_mean, "final_norm.mean", "B,T,G", SAVED, MEGALODON_ALWAYS)                                              \
    X(final_var,  "final_norm.var",  "B,T,G", SAVED, MEGALODON_ALWAYS)                                              \
    X(final,      "final_norm",      "B,T,D", CHEAP, MEGALODON_ALWAYS)                                              \
    X(logits,     "logits",          "B,T,V", LOGITS, MEGALODON_ALWAYS)                                             \
    X(nll,        "nll",             "B,T",   SAVED, MEGALODON_ALWAYS)

/* State: all that a later call needs of the tokens before it, bounded by C. "layers.{i}." before the layer
 * ones. count is int64, one a row of the batch; rows may differ, but they stand at the same place in their
 * chunk (count[b] mod C = n for every b). Statistics are double, everything else float. */
#define MEGALODON_LAYER_STATE(X)                                                                                    \
    X(norm_mean,  "norm.mean",       "B,G")                                                                         \
    X(norm_var,   "norm.var",        "B,G")                                                                         \
    X(cema,       "cema",            "B,D,N,2")                                                                     \
    X(k,          "k",               "B,n,H,z")                                                                     \
    X(v,          "v",               "B,n,H,e")
#define MEGALODON_MODEL_STATE(X)                                                                                    \
    X(count,      "count",           "B")                                                                           \
    X(final_mean, "final_norm.mean", "B,G")                                                                         \
    X(final_var,  "final_norm.var",  "B,G")

typedef enum { MEGALODON_F32, MEGALODON_F64, MEGALODON_BF16, MEGALODON_I32, MEGALODON_I64 } MegalodonDType;

typedef enum {
    MEGALODON_PARAM,           /* parameters                                                      */
    MEGALODON_GRAD,            /* d loss / d parameter, accumulated since zero_gradients          */
    MEGALODON_MOMENT1,         /* AdamW's first moment of each parameter                          */
    MEGALODON_MOMENT2,         /* AdamW's second moment                                           */
    MEGALODON_ACT,             /* activations of the last forward                                 */
    MEGALODON_STATE,           /* the state after the last forward (or as set)                    */
    MEGALODON_GRAD_STATE_IN,   /* after backward: d loss / d state that came in                   */
    MEGALODON_GRAD_STATE_OUT   /* before backward: d loss / d state that went out; default none   */
} MegalodonKind;

enum { MEGALODON_MAX_NAME = 64, MEGALODON_MAX_DIMS = 4 };

typedef struct MegalodonTensor {
    char name[MEGALODON_MAX_NAME];
    int ndim;
    int64_t dims[MEGALODON_MAX_DIMS];
    int64_t size;                          /* product of dims                             */
    MegalodonInit init;                    /* parameters only                             */
    int layer;                             /* -1 outside the blocks                       */
} MegalodonTensor;

/* Lists the tensors of a kind in graph order: returns how many there are and fills at most `capacity` of
 * them. B, T and n matter for activations and state only. Gradients and moments are listed like parameters. */
int megalodon_tensors(const MegalodonConfig *config, MegalodonKind kind, int B, int T, int n,
                      MegalodonTensor *out, int capacity);
/* Finds one by name. Error: no such tensor in this configuration. */
const char *megalodon_find_tensor(const MegalodonConfig *config, MegalodonKind kind, int B, int T, int n,
                                  const char *name, MegalodonTensor *out);
/* Initial values of one parameter: a function of (seed, name) alone, the same for every backend. */
void megalodon_initial_values(const MegalodonConfig *config, const MegalodonTensor *tensor, uint64_t seed,
                              float *out);

/* The counter-based generator behind dropout and initialisation: a well mixed 64-bit value for each counter.
 * An element of a dropout site is dropped when (bits >> 40) < p * 2^24; the others are scaled by 1/(1-p). */
uint64_t megalodon_random(uint64_t key, uint64_t counter);
typedef enum { MEGALODON_SITE_EMBED, MEGALODON_SITE_M, MEGALODON_SITE_ATTENTION, MEGALODON_SITE_GATED,
               MEGALODON_SITE_H, MEGALODON_SITE_HIDDEN, MEGALODON_SITE_FFN } MegalodonSite;
uint64_t megalodon_dropout_key(uint64_t seed, uint64_t step, int layer, MegalodonSite site);

/* ----------------------------------------------------------------------------------------------------
 * 3. Model: what a backend does. The programs know nothing else.
 */

typedef struct MegalodonModel MegalodonModel;              /* each backend's own */
typedef enum { MEGALODON_FP32, MEGALODON_BF16_MIXED } MegalodonPrecision;

typedef struct MegalodonOptions {
    int max_batch, max_length;       /* largest B and T of a forward                                      */
    bool training;                   /* gradients, moments and saved activations; else inference only     */
    bool keep_activations;           /* every named activation of the last forward can be fetched         */
    bool carry;                      /* keep the state after a forward, so that the next can go on from it;
                                        models for inference always do                                    */
    bool state_gradients;            /* training with carry: GRAD_STATE_IN and GRAD_STATE_OUT exist       */
    MegalodonPrecision precision;    /* fp32 everywhere, or bf16 weights and activations (GPU)            */
    int64_t max_bytes;               /* create refuses to need more memory, of the device's own on a GPU; 0: no
                                        limit but a GPU's free memory                                     */
} MegalodonOptions;

enum { MEGALODON_IGNORE = -1 };      /* a target that does not count */

typedef struct MegalodonBatch {
    const int32_t *tokens;           /* B,T: each in [0, V)                                               */
    const int32_t *targets;          /* B,T: in [0, V) or MEGALODON_IGNORE; NULL: no loss                 */
    int B, T;
    bool carry;                      /* go on from the model's state; else start from an empty one        */
    bool dropout;                    /* apply the configuration's dropout, with masks from seed and step  */
    uint64_t seed, step;
} MegalodonBatch;

typedef struct MegalodonLoss {
    double nll_sum;                  /* nats, over the targets that count */
    int64_t counted;
} MegalodonLoss;

typedef struct MegalodonAdamW {
    double lr, beta1, beta2, eps, weight_decay;
    double clip;                     /* largest global gradient norm; 0: no clipping   */
    double max_norm;                 /* a larger norm changes nothing; 0: any may      */
    int64_t step;                    /* 1 for the first update (bias correction)       */
    bool spare_cema;                 /* no weight decay on CEMA's parameters           */
} MegalodonAdamW;

typedef struct MegalodonMemory {     /* bytes, all allocated by create */
    int64_t parameters, gradients, moments, activations, state, workspace;
    int64_t device_used;             /* what is taken on the device at this moment, by all programs; 0 on a CPU */
} MegalodonMemory;

/* All bytes that create allocated. */
static inline int64_t megalodon_total_memory(const MegalodonMemory *m) {
    return m->parameters + m->gradients + m->moments + m->activations + m->state + m->workspace;
}

typedef struct MegalodonComponentFunctions MegalodonComponentFunctions;

typedef struct MegalodonBackend {
    const char *name;
    /* NULL if this backend can run here, else why it cannot. */
    const char *(*unavailable)(void);
    /* Allocates everything once. Parameters are unset, gradients and moments zero, the state empty. Error: an invalid
     * configuration, or too little memory, which is found out before any is taken: the bytes needed, those that there
     * are, and the largest batch that would fit. */
    const char *(*create)(MegalodonModel **model, const MegalodonConfig *config,
                          const MegalodonOptions *options);
    void (*destroy)(MegalodonModel *model);
    /* Runs B,T tokens through the model and moves its state on. loss may be NULL. */
    const char *(*forward)(MegalodonModel *model, const MegalodonBatch *batch, MegalodonLoss *loss);
    /* Logits of the last position of each row after a forward: out is B,V float. */
    const char *(*last_logits)(MegalodonModel *model, float *out);
    /* Gradient of scale * nll_sum of the last forward, added to the parameters' gradients. scale =
     * 1/counted gives the mean; with accumulation, 1 over all micro-batches' counted. Takes in
     * GRAD_STATE_OUT if it was set since the forward, writes GRAD_STATE_IN if the forward carried a state.
     * Once a forward. */
    const char *(*backward)(MegalodonModel *model, double scale);
    void (*zero_gradients)(MegalodonModel *model);
    /* Clips by the global norm and applies AdamW to every parameter. grad_norm: before clipping. A norm
     * that is not finite or above max_norm changes nothing (the caller sees it in grad_norm). */
    const char *(*update)(MegalodonModel *model, const MegalodonAdamW *adamw, double *grad_norm);
    /* Copies a tensor out of or into the model, converting to or from dtype (F32, F64 or BF16; count: I64).
     * The layout is megalodon_tensors' for the last forward's B and T and the state's n. */
    const char *(*get)(MegalodonModel *model, MegalodonKind kind, const char *name, void *out,
                       MegalodonDType dtype);
    const char *(*set)(MegalodonModel *model, MegalodonKind kind, const char *name, const void *in,
                       MegalodonDType dtype);
    /* Makes the state one of B rows after count[b] tokens, with every other tensor zero: the first step of
     * loading a state, whose tensors are then set one by one. Error: the rows stand at different places in
     * their chunk. */
    const char *(*start_state)(MegalodonModel *model, int B, const int64_t *count);
    /* Empties the rows b of the state with rows[b]: they start anew, the others go on. Error: there is no state, or
     * it stands inside a chunk, where a row cannot start. */
    const char *(*reset_rows)(MegalodonModel *model, const bool *rows);
    /* Number of rows of the state and its position in the chunk; B = 0 before the first forward. */
    void (*state_shape)(const MegalodonModel *model, int *B, int *n);
    void (*memory)(const MegalodonModel *model, MegalodonMemory *memory);
    /* The components one by one, for tests, benchmarks and ports: index with MegalodonComponentId. */
    const MegalodonComponentFunctions *components;
} MegalodonBackend;

/* What in a batch a model with a state of state_rows rows cannot take: sizes, tokens or targets outside the
 * vocabulary, a state that is not there. For backends: the first thing that forward does. */
const char *megalodon_check_batch(const MegalodonConfig *config, const MegalodonOptions *options,
                                  const MegalodonBatch *batch, int state_rows);

/* What keeps a state of state_rows rows, n tokens into a chunk, from giving up rows. For backends: the first thing
 * that reset_rows does. */
const char *megalodon_check_reset(const MegalodonOptions *options, int state_rows, int n);

extern const MegalodonBackend megalodon_cpu;          /* megalodon.c, float                                    */
extern const MegalodonBackend megalodon_cpu_double;   /* the same source compiled with -DMEGALODON_REAL=double */
#ifdef MEGALODON_WITH_CUDA
extern const MegalodonBackend megalodon_cuda;         /* megalodon.cu                                          */
#endif

/* The weight decay of one parameter. */
static inline double megalodon_weight_decay(const MegalodonAdamW *adamw, const MegalodonTensor *parameter) {
    bool cema = parameter->init >= MEGALODON_INIT_CEMA && parameter->init <= MEGALODON_INIT_CEMA_OMEGA;
    return adamw->spare_cema && cema ? 0 : adamw->weight_decay;
}

/* Fills a new model with initial values. */
const char *megalodon_initialise(const MegalodonBackend *backend, MegalodonModel *model,
                                 const MegalodonConfig *config, uint64_t seed);

/* ----------------------------------------------------------------------------------------------------
 * 4. Components: each forward/backward pair of the model with typed arguments, so that one harness can check
 *    gradients, compare backends and time each piece. A port starts here: fill the table entry by entry.
 */

typedef struct MegalodonShape {      /* sizes of one component call */
    MegalodonConfig config;          /* D, N, H, ... eps, rope_base, dropouts */
    int B, T, n;
    uint64_t key;                    /* dropout key */
    MegalodonPrecision precision;    /* type of REAL arguments on a GPU */
} MegalodonShape;

typedef enum {
    MEGALODON_OUT, MEGALODON_SAVED, MEGALODON_STATE_OUT,     /* written by the forward                              */
    MEGALODON_IN, MEGALODON_STATE_IN, MEGALODON_WEIGHT,      /* read; IN and STATE_IN gradients are written         */
    MEGALODON_INDEX                                          /* read; integers without a gradient                   */
} MegalodonRole;                                             /* WEIGHT gradients are accumulated (+=)               */

typedef enum {
    MEGALODON_REAL_ARG,   /* activation type: float (CPU), double (CPU double), float or bf16 (GPU)               */
    MEGALODON_STAT_ARG,   /* statistic: float, double on CPU double; never bf16                                   */
    MEGALODON_WIDE_ARG,   /* double everywhere                                                                    */
    MEGALODON_I32_ARG, MEGALODON_I64_ARG
} MegalodonArgType;

typedef struct MegalodonArg {
    const char *name;
    MegalodonRole role;
    MegalodonArgType type;
    const char *shape;               /* letters as above */
} MegalodonArg;

enum { MEGALODON_MAX_ARGS = 14 };

typedef struct MegalodonComponent {
    const char *name;
    MegalodonArg args[MEGALODON_MAX_ARGS];   /* outputs, saved, inputs, parameters; ends at name NULL */
} MegalodonComponent;

typedef enum {
    MEGALODON_EMBEDDING, MEGALODON_TIMESTEPNORM, MEGALODON_CEMA, MEGALODON_RMSNORM, MEGALODON_LINEAR,
    MEGALODON_ZNORM, MEGALODON_QK_AFFINE, MEGALODON_ROPE, MEGALODON_SILU, MEGALODON_ATTENTION, MEGALODON_GATE,
    MEGALODON_LAYERNORM, MEGALODON_SWIGLU, MEGALODON_RESCALE, MEGALODON_DROPOUT, MEGALODON_CROSS_ENTROPY,
    MEGALODON_NUM_COMPONENTS
} MegalodonComponentId;

extern const MegalodonComponent megalodon_components[MEGALODON_NUM_COMPONENTS];

/* args[i] is the i-th argument's data, grads[i] its gradient (same shape, same type). In args, a NULL state
 * or weight is an absent one. In grads, NULL means: a STATE_IN gradient that is not wanted, a STATE_OUT
 * gradient of zero, or an argument that has no gradient or is absent. */
struct MegalodonComponentFunctions {
    void (*forward)(void *const *args, const MegalodonShape *shape);
    void (*backward)(void *const *grads, void *const *args, const MegalodonShape *shape);
};

/* Fills dims from letters such as "B,T,H,z"; returns the number of dimensions. */
int megalodon_shape(const char *letters, const MegalodonConfig *config, int B, int T, int n,
                    int64_t dims[MEGALODON_MAX_DIMS]);

#ifdef __cplusplus
}
#endif
#endif
