/* model_options.h - every field of a model's configuration as an option of a program: a row each, derived from the
 * one list in megalodon.h. megalodon_validate knows the relations between them.
 */
#ifndef MODEL_OPTIONS_H
#define MODEL_OPTIONS_H

#include <stddef.h>

#include "../megalodon.h"
#include "options.h"

#define OPTION_FOR_int    OPTION_INT,  0, 1 << 30, "N"
#define OPTION_FOR_double OPTION_REAL, 0, 1e12,    "X"
#define OPTION_FOR_bool   OPTION_BOOL, 0, 0,       "true|false"
#define MODEL_ROW(field, meaning, type, low, high, unit) \
    {#field, type, offsetof(MegalodonConfig, field), NULL, low, high, unit, "Model", meaning},
#define MODEL_ROW_OF(...) MODEL_ROW(__VA_ARGS__)
static const Option model_table[] = {
#define X(type, field, fallback, meaning) MODEL_ROW_OF(field, meaning, OPTION_FOR_##type)
    MEGALODON_CONFIG_FIELDS(X)
#undef X
};

#endif
