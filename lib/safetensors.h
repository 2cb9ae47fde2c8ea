/* safetensors.h - reads and writes safetensors files, the format in which Python's libraries exchange
 * weights.
 *
 * A file is: 8 bytes, the header's length (little-endian); the header, JSON; then the tensors' bytes. The
 * header maps each name to {"dtype": "F32", "shape": [2,3], "data_offsets": [first, end]}, offsets counting
 * from the end of the header, and "__metadata__" to an object of strings.
 *
 * The reader takes nothing on trust: a file that it opened has every tensor's bytes inside the file,
 * exactly as many as dtype and shape need, no byte twice and none left over. The writer makes a file that
 * is there whole or not at all, and puts checksums into its metadata, by which a reader can tell whether a
 * bit has changed since.
 *
 *     Safetensors file;
 *     const char *error = safetensors_open(&file, "model.safetensors");
 *     const SafetensorsTensor *embed = safetensors_find(&file, "embed.weight");
 *     safetensors_to_float(embed, buffer);
 *     safetensors_close(&file);
 *
 * Needs POSIX: a program that includes this defines _POSIX_C_SOURCE 200809L before its first #include.
 */
#ifndef LIB_SAFETENSORS_H
#define LIB_SAFETENSORS_H

#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"
#include "json.h"

enum {
    SAFETENSORS_MAX_DIMS = 8,
    SAFETENSORS_MAX_HEADER = 100000000,      /* bytes: the limit that other readers of the format have */
    SAFETENSORS_MAX_PATH = 4096,
    SAFETENSORS_SHAPE_TEXT = 24 * SAFETENSORS_MAX_DIMS,
    SAFETENSORS_WORD = 17                    /* bytes of a checksum: 16 digits and what follows them */
};
#define SAFETENSORS_CHECKSUM "checksum"      /* its key in __metadata__ */

typedef enum {
    SAFETENSORS_F64,
    SAFETENSORS_I64,
    SAFETENSORS_F32,
    SAFETENSORS_I32,
    SAFETENSORS_BF16,
    SAFETENSORS_F16,
    SAFETENSORS_U8,
    SAFETENSORS_NUM_DTYPES
} SafetensorsDType;

typedef struct SafetensorsTensor {
    const char *name;
    SafetensorsDType dtype;
    int ndim;                                /* 0: a single number                                            */
    int64_t dims[SAFETENSORS_MAX_DIMS];
    int64_t size;                            /* product of dims                                               */
    size_t bytes;
    const void *data;                        /* may be unaligned: copy, or use safetensors_to_                */
    bool in_file;                            /* data lies in a file that was opened: it is little-endian      */
} SafetensorsTensor;

typedef struct Safetensors {
    char *path;
    SafetensorsTensor *tensors;              /* in the order of their names */
    size_t count;
    const JsonNode *metadata;                /* NULL if there is none       */
    Json header;
    void *map;                               /* the whole file              */
    size_t map_bytes;
} Safetensors;

static inline const char *safetensors_dtype_name(SafetensorsDType dtype) {
    static const char *const names[] = {"F64", "I64", "F32", "I32", "BF16", "F16", "U8"};
    return names[dtype];
}

/* Bytes of one element. */
static inline size_t safetensors_dtype_bytes(SafetensorsDType dtype) {
    static const size_t bytes[] = {8, 8, 4, 4, 2, 2, 1};
    return bytes[dtype];
}

/* A shape as messages show it: "[2,3]". Returns `text`. */
static inline const char *safetensors_shape_text(int ndim, const int64_t *dims,
                                                 char text[SAFETENSORS_SHAPE_TEXT]) {
    int n = snprintf(text, SAFETENSORS_SHAPE_TEXT, "[");
    for (int i = 0; i < ndim; i++)
        n += snprintf(text + n, (size_t)(SAFETENSORS_SHAPE_TEXT - n), "%s%" PRId64, i ? "," : "", dims[i]);
    snprintf(text + n, (size_t)(SAFETENSORS_SHAPE_TEXT - n), "]");
    return text;
}

/* Files are little-endian. Where this machine is too, which a compiler knows, numbers are copied as they are. */
static inline bool safetensors_little_endian(void) {
    const uint16_t one = 1;
    unsigned char first;
    memcpy(&first, &one, 1);
    return first == 1;
}

/* Copies `count` numbers of `width` bytes from a file's order of bytes to this machine's, or back. out may be in. */
static inline void safetensors_copy(void *out, const void *in, size_t count, size_t width) {
    unsigned char *bytes = out;
    if (out != in && count > 0) memcpy(out, in, count * width);
    for (size_t i = 0; i < count && !safetensors_little_endian(); i++)
        for (size_t low = i * width, high = low + width - 1; low < high; low++, high--) {
            unsigned char byte = bytes[low];
            bytes[low] = bytes[high];
            bytes[high] = byte;
        }
}

/* Up to 8 bytes of a file as a number. */
static inline uint64_t safetensors_load(const void *bytes, size_t size) {
    uint64_t word = 0;
    memcpy(&word, bytes, size);
    safetensors_copy(&word, &word, 1, 8);
    return word;
}

/* ----------------------------------------------------------------------------------------------------
 * Checksums. In files that we wrote, "checksum" in __metadata__ is a list of words, 16 hexadecimal digits
 * each, with a space between two. The first is the header's: the sum of what safetensors_sum gives for
 * each tensor's name, dtype and shape and for each other key of __metadata__ with its value. The others are
 * those of the tensors' bytes, in the order of their names. So no word depends on how the header is
 * written or the data laid out, and a copy of the file by another program still has the right ones.
 */

/* One word into a sum. Both steps can be undone, so two sums that differ still do after the same words. */
static inline uint64_t safetensors_mix(uint64_t sum, uint64_t word) {
    sum = (sum ^ word) * 0x9E3779B97F4A7C15u;                   /* odd: no bit is lost                      */
    return sum << 29 | sum >> 35;                               /* brings down what the product carried up  */
}

/* Takes `size` bytes of a file into a sum. A change inside one aligned word of 8 bytes, of any number of bits, always
 * changes the sum; others do but for one in 2^64. Four sums side by side, as one would wait for its product:
 * 14 GB/s on a core that makes 4 with one. */
static inline uint64_t safetensors_sum(uint64_t sum, const void *bytes, size_t size) {
    const char *at = bytes;
    uint64_t word[4], lane[4] = {sum, ~sum, sum + 1, ~sum - 1};
    size_t left = size;
    for (; left >= 32; left -= 32, at += 32) {
        memcpy(word, at, 32);
        safetensors_copy(word, word, 4, 8);
        for (int i = 0; i < 4; i++) lane[i] = safetensors_mix(lane[i], word[i]);
    }
    sum = safetensors_mix(sum, size);
    for (int i = 0; i < 4; i++) sum = safetensors_mix(sum, lane[i]);
    while (left > 0) {
        size_t some = left < 8 ? left : 8;
        sum = safetensors_mix(sum, safetensors_load(at, some));
        left -= some, at += some;
    }
    return sum;
}

/* What a tensor's description and a string of __metadata__ add to the header's checksum. */
static inline uint64_t safetensors_entry_sum(const SafetensorsTensor *tensor) {
    const char *dtype = safetensors_dtype_name(tensor->dtype);
    uint64_t sum = safetensors_sum(1, tensor->name, strlen(tensor->name));
    sum = safetensors_sum(sum, dtype, strlen(dtype));
    for (int i = 0; i < tensor->ndim; i++) sum = safetensors_mix(sum, (uint64_t)tensor->dims[i]);
    return safetensors_mix(sum, (uint64_t)tensor->ndim);
}
static inline uint64_t safetensors_pair_sum(const char *key, const char *value) {
    if (strcmp(key, SAFETENSORS_CHECKSUM) == 0) return 0;
    return safetensors_sum(safetensors_sum(2, key, strlen(key)), value, strlen(value));
}

/* ----------------------------------------------------------------------------------------------------
 * Reading.
 */

static inline int safetensors_by_offset(const void *a, const void *b) {
    const SafetensorsTensor *x = a, *y = b;
    uintptr_t p = (uintptr_t)x->data, q = (uintptr_t)y->data;
    if (p != q) return p < q ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;       /* an empty tensor stands before what it touches */
}

static inline int safetensors_by_name(const void *a, const void *b) {
    return strcmp(((const SafetensorsTensor *)a)->name, ((const SafetensorsTensor *)b)->name);
}

/* The shape of one header entry: sizes that are not negative and whose product can be counted in bytes. */
static inline const char *safetensors_read_shape(const char *path, const JsonNode *shape,
                                                 SafetensorsTensor *tensor) {
    if (!shape || shape->type != JSON_ARRAY)
        return errorf("%s: tensor %s: expected \"shape\" to be an array, found %s", path, tensor->name,
                      json_type_name(shape));
    if (shape->count > SAFETENSORS_MAX_DIMS)
        return errorf("%s: tensor %s: expected at most %d dimensions, found %" PRIu32, path, tensor->name,
                      SAFETENSORS_MAX_DIMS, shape->count);
    tensor->size = 1;
    bool empty = false;
    for (const JsonNode *dim = json_first(shape); dim; dim = json_next(shape, dim)) {
        if (!dim->is_integer || dim->integer < 0)
            return errorf(
                "%s: tensor %s: expected dimension %d of its shape to be an integer from 0 on, found %s",
                path, tensor->name, tensor->ndim, dim->is_integer ? "a negative one" : json_type_name(dim));
        tensor->dims[tensor->ndim++] = dim->integer;
        empty = empty || dim->integer == 0;
        /* The largest element has 8 bytes. A zero further on does not excuse an overflow before it. */
        if (dim->integer > 0 && tensor->size > INT64_MAX / 8 / dim->integer)
            return errorf("%s: tensor %s: its shape has more elements than memory has bytes", path,
                          tensor->name);
        if (dim->integer > 0) tensor->size *= dim->integer;
    }
    if (empty) tensor->size = 0;
    return NULL;
}

/* One entry of the header. `data` has `available` bytes. */
static inline const char *safetensors_read_entry(const char *path, const JsonNode *entry, const char *data,
                                                 size_t available, SafetensorsTensor *tensor) {
    *tensor = (SafetensorsTensor){.name = entry->key, .in_file = true};
    for (const JsonNode *member = json_first(entry); member && entry->type == JSON_OBJECT;
         member = json_next(entry, member))
        if (strcmp(member->key, "dtype") != 0 && strcmp(member->key, "shape") != 0 &&
            strcmp(member->key, "data_offsets") != 0)
            return errorf("%s: tensor %s: unknown member \"%.80s\"; expected dtype, shape and data_offsets",
                          path, tensor->name, member->key);
    const JsonNode *dtype = json_get(entry, "dtype"), *offsets = json_get(entry, "data_offsets");
    int d = 0;
    while (d < SAFETENSORS_NUM_DTYPES && !json_is(dtype, safetensors_dtype_name((SafetensorsDType)d))) d++;
    if (d == SAFETENSORS_NUM_DTYPES)
        return errorf("%s: tensor %s: expected dtype F64, F32, F16, BF16, I64, I32 or U8, found %.20s", path,
                      tensor->name,
                      dtype && dtype->type == JSON_STRING ? dtype->string : json_type_name(dtype));
    tensor->dtype = (SafetensorsDType)d;
    const char *error = safetensors_read_shape(path, json_get(entry, "shape"), tensor);
    if (error) return error;
    const JsonNode *first = json_first(offsets),
                   *end = offsets && offsets->count == 2 ? first + first->span : NULL;
    if (!end || offsets->type != JSON_ARRAY || !first->is_integer || !end->is_integer || first->integer < 0)
        return errorf("%s: tensor %s: expected \"data_offsets\" to be two integers from 0 on", path,
                      tensor->name);
    char shape[SAFETENSORS_SHAPE_TEXT];
    uint64_t bytes = (uint64_t)tensor->size * safetensors_dtype_bytes(tensor->dtype);
    if (end->integer < first->integer || (uint64_t)(end->integer - first->integer) != bytes)
        return errorf("%s: tensor %s: %s %s needs %" PRIu64 " bytes, but data_offsets go from %" PRId64
                      " to %" PRId64,
                      path, tensor->name, safetensors_dtype_name(tensor->dtype),
                      safetensors_shape_text(tensor->ndim, tensor->dims, shape), bytes, first->integer,
                      end->integer);
    if ((uint64_t)end->integer > available)
        return errorf("%s: tensor %s: ends at byte %" PRId64
                      " of the data, but the file has only %zu; it may be "
                      "truncated",
                      path, tensor->name, end->integer, available);
    tensor->data = data + first->integer;
    tensor->bytes = (size_t)bytes;                           /* which the file has, so it fits */
    return NULL;
}

/* Tensors, sorted by offset, must cover the data from its first byte to its last, each byte once. */
static inline const char *safetensors_check_cover(const Safetensors *file, const char *data,
                                                  size_t available) {
    const char *expected = data;
    for (size_t i = 0; i < file->count; i++) {
        const SafetensorsTensor *tensor = &file->tensors[i];
        if ((const char *)tensor->data != expected)
            return errorf(
                "%s: tensor %s: expected it to start at byte %td of the data, where the one before it ends, "
                "found %td",
                file->path, tensor->name, expected - data, (const char *)tensor->data - data);
        expected += tensor->bytes;
    }
    if (expected != data + available)
        return errorf("%s: the tensors end at byte %td of the data, but the file has %zu", file->path,
                      expected - data, available);
    return NULL;
}

/* The header's length, its JSON, and every tensor in it. */
static inline const char *safetensors_read_header(Safetensors *file) {
    const unsigned char *bytes = file->map;
    const char *path = file->path, *json = (const char *)bytes + 8;
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--) length = length << 8 | bytes[i];
    if (length > SAFETENSORS_MAX_HEADER)
        return errorf("%s: its header would have %" PRIu64
                      " bytes, the limit is %d; is this a safetensors file?",
                      path, length, SAFETENSORS_MAX_HEADER);
    if (length > file->map_bytes - 8)
        return errorf("%s: its header has %" PRIu64
                      " bytes, but the file ends after %zu; it may be truncated",
                      path, length, file->map_bytes - 8);
    if (length == 0 || json[0] != '{')
        return errorf("%s: expected a header that starts with '{'; is this a safetensors file?", path);
    const char *error = json_parse(&file->header, json, (size_t)length);
    if (error) return errorf("%s: header, %s", path, error);
    const JsonNode *root = file->header.root;
    const char *data = json + length;
    size_t available = file->map_bytes - 8 - (size_t)length;
    file->tensors = malloc((root->count + (size_t)1) * sizeof *file->tensors);
    if (!file->tensors) return errorf("%s: out of memory for %" PRIu32 " tensors", path, root->count);
    for (const JsonNode *entry = json_first(root); entry; entry = json_next(root, entry)) {
        if (strlen(entry->key) != entry->key_length)
            return errorf("%s: tensor %s: its name has a 0 byte inside", path, entry->key);
        if (strcmp(entry->key, "__metadata__") == 0) {
            file->metadata = entry;
            if (entry->type != JSON_OBJECT)
                return errorf("%s: expected __metadata__ to be an object, found %s", path,
                              json_type_name(entry));
            for (const JsonNode *value = json_first(entry); value; value = json_next(entry, value)) {
                if (value->type != JSON_STRING)
                    return errorf("%s: __metadata__: expected \"%.80s\" to be a string, found %s", path,
                                  value->key, json_type_name(value));
                if (strlen(value->key) != value->key_length || strlen(value->string) != value->length)
                    return errorf("%s: __metadata__: \"%.80s\" has a 0 byte inside", path, value->key);
            }
            continue;
        }
        error = safetensors_read_entry(path, entry, data, available, &file->tensors[file->count]);
        if (error) return error;
        file->count++;
    }
    qsort(file->tensors, file->count, sizeof *file->tensors, safetensors_by_offset);
    if ((error = safetensors_check_cover(file, data, available))) return error;
    qsort(file->tensors, file->count, sizeof *file->tensors, safetensors_by_name);
    return NULL;
}

static inline void safetensors_close(Safetensors *file) {
    if (file->map) munmap(file->map, file->map_bytes);
    json_free(&file->header);
    free(file->tensors);
    free(file->path);
    *file = (Safetensors){0};
}

/* Opens a file for reading; the tensors' bytes are read when they are used (the file is mapped). Error: the
 * file, the tensor, what was expected and what was found; nothing is left to close then. */
static inline const char *safetensors_open(Safetensors *file, const char *path) {
    *file = (Safetensors){0};
    int descriptor = open(path, O_RDONLY);
    if (descriptor < 0) return errorf("%s: cannot open: %s", path, strerror(errno));
    struct stat status;
    const char *error = NULL;
    if (fstat(descriptor, &status) != 0) {
        error = errorf("%s: cannot read: %s", path, strerror(errno));
    } else if (!S_ISREG(status.st_mode)) {
        error = errorf("%s: expected a file, found a directory or a device", path);
    } else if ((uint64_t)status.st_size > SIZE_MAX) {
        error = errorf("%s: has %lld bytes, more than this machine can address", path, (long long)status.st_size);
    } else if (status.st_size < 8) {
        error = errorf("%s: expected a safetensors file, found only %lld bytes; it may be truncated", path,
                       (long long)status.st_size);
    } else {
        file->map_bytes = (size_t)status.st_size;
        file->map = mmap(NULL, file->map_bytes, PROT_READ, MAP_PRIVATE, descriptor, 0);
        if (file->map == MAP_FAILED) {
            file->map = NULL;
            error = errorf("%s: cannot map %zu bytes: %s", path, file->map_bytes, strerror(errno));
        } else if (!(file->path = strdup(path))) {
            error = errorf("%s: out of memory", path);
        } else {
            error = safetensors_read_header(file);
        }
    }
    close(descriptor);
    if (error) safetensors_close(file);
    return error;
}

/* The tensor with this name, or NULL. */
static inline const SafetensorsTensor *safetensors_find(const Safetensors *file, const char *name) {
    SafetensorsTensor key = {.name = name};
    return bsearch(&key, file->tensors, file->count, sizeof key, safetensors_by_name);
}

/* The string in __metadata__ with this key, or NULL. Valid until the file is closed. */
static inline const char *safetensors_metadata(const Safetensors *file, const char *key) {
    const JsonNode *value = json_get(file->metadata, key);
    return value ? value->string : NULL;
}

/* Word number i of the file's checksum. False: it has none, and there is nothing to compare. Error: it is not
 * the list that it should be. */
static inline const char *safetensors_word(const Safetensors *file, size_t i, bool *known, uint64_t *word) {
    const char *text = safetensors_metadata(file, SAFETENSORS_CHECKSUM);
    *known = text != NULL;
    *word = 0;
    if (!text) return NULL;
    if (strlen(text) == SAFETENSORS_WORD * (file->count + 1) - 1) {
        char digits[SAFETENSORS_WORD];
        memcpy(digits, text + SAFETENSORS_WORD * i, SAFETENSORS_WORD);
        bool last = i == file->count;
        bool ok = digits[SAFETENSORS_WORD - 1] == (last ? '\0' : ' ') && strspn(digits, "0123456789abcdef") == 16;
        digits[SAFETENSORS_WORD - 1] = '\0';
        *word = strtoull(digits, NULL, 16);
        if (ok) return NULL;
    }
    return errorf("%s: expected \"%s\" in __metadata__ to be %zu words of 16 hexadecimal digits, found \"%.40s\"; "
                  "the file is damaged", file->path, SAFETENSORS_CHECKSUM, file->count + 1, text);
}

static inline const char *safetensors_sums_differ(const Safetensors *file, const char *what, const char *name,
                                                  uint64_t expected, uint64_t found) {
    return errorf("%s: %s%.120s: expected the checksum %016" PRIx64 ", found %016" PRIx64 "; the file was damaged or "
                  "changed after it was written: take another copy (--no-verify reads it as it is)", file->path, what,
                  name, expected, found);
}

/* Are the names, types, shapes and strings of the header those that were written? A file without a checksum
 * passes. Error: the file, and both checksums. */
static inline const char *safetensors_verify_header(const Safetensors *file) {
    uint64_t expected, sum = 0;
    bool known;
    const char *error = safetensors_word(file, 0, &known, &expected);
    if (error || !known) return error;
    for (size_t i = 0; i < file->count; i++) sum += safetensors_entry_sum(&file->tensors[i]);
    for (const JsonNode *value = json_first(file->metadata); value; value = json_next(file->metadata, value))
        sum += safetensors_pair_sum(value->key, value->string);
    return sum == expected ? NULL : safetensors_sums_differ(file, "its header", "", expected, sum);
}

/* Are the bytes of one of the file's tensors those that were written? Reads all of them. A file without a
 * checksum passes. Error: the file, the tensor, and both checksums. */
static inline const char *safetensors_verify_tensor(const Safetensors *file, const SafetensorsTensor *tensor) {
    uint64_t expected, sum;
    bool known;
    const char *error = safetensors_word(file, (size_t)(tensor - file->tensors) + 1, &known, &expected);
    if (error || !known) return error;
    sum = safetensors_sum(0, tensor->data, tensor->bytes);
    return sum == expected ? NULL : safetensors_sums_differ(file, "tensor ", tensor->name, expected, sum);
}

/* Header and all tensors. */
static inline const char *safetensors_verify(const Safetensors *file) {
    const char *error = safetensors_verify_header(file);
    for (size_t i = 0; i < file->count && !error; i++) error = safetensors_verify_tensor(file, &file->tensors[i]);
    return error;
}

static inline double safetensors_half(uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double value = exponent == 31 ? (fraction ? (double)NAN : (double)INFINITY)
                 : exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return bits >> 15 ? -value : value;
}

/* Copies elements [first, first + count) as they are, in this machine's order of bytes. */
static inline void safetensors_take(const SafetensorsTensor *tensor, int64_t first, int64_t count, void *out) {
    size_t width = safetensors_dtype_bytes(tensor->dtype);
    const char *at = (const char *)tensor->data + (size_t)first * width;
    if (tensor->in_file) safetensors_copy(out, at, (size_t)count, width);
    else if (count > 0) memcpy(out, at, (size_t)count * width);
}

/* Element i as a double: exact but for an I64 above 2^53. */
static inline double safetensors_element(const SafetensorsTensor *tensor, int64_t i) {
    union {
        double f64;
        int64_t i64;
        float f32;
        int32_t i32;
        uint32_t u32;
        uint16_t u16;
        uint8_t u8;
    } x = {0}, wide;
    safetensors_take(tensor, i, 1, &x);
    switch (tensor->dtype) {
    case SAFETENSORS_F64: return x.f64;
    case SAFETENSORS_I64: return (double)x.i64;
    case SAFETENSORS_F32: return x.f32;
    case SAFETENSORS_I32: return x.i32;
    case SAFETENSORS_F16: return safetensors_half(x.u16);
    case SAFETENSORS_BF16: wide.u32 = (uint32_t)x.u16 << 16; return wide.f32;  /* the upper half of a float */
    default: return x.u8;
    }
}

/* All elements of a tensor of any dtype, converted; out has tensor->size elements. */
static inline void safetensors_to_double(const SafetensorsTensor *tensor, double *out) {
    for (int64_t i = 0; i < tensor->size; i++) out[i] = safetensors_element(tensor, i);
}
static inline void safetensors_to_float(const SafetensorsTensor *tensor, float *out) {
    if (tensor->dtype == SAFETENSORS_F32) safetensors_take(tensor, 0, tensor->size, out);
    else for (int64_t i = 0; i < tensor->size; i++) out[i] = (float)safetensors_element(tensor, i);
}

/* All elements of an I64, I32 or U8 tensor, exactly. Error: it has another dtype. */
static inline const char *safetensors_to_int64(const SafetensorsTensor *tensor, int64_t *out) {
    if (tensor->dtype == SAFETENSORS_I64)
        safetensors_take(tensor, 0, tensor->size, out);
    else if (tensor->dtype == SAFETENSORS_I32 || tensor->dtype == SAFETENSORS_U8)
        for (int64_t i = 0; i < tensor->size; i++) out[i] = (int64_t)safetensors_element(tensor, i);
    else
        return errorf("tensor %s: expected dtype I64, I32 or U8, found %s", tensor->name,
                      safetensors_dtype_name(tensor->dtype));
    return NULL;
}

/* A mapped file that becomes shorter, or whose disk is lost, while it is read ends a program by SIGBUS. */
static inline void safetensors_lost(int signal) {
    static const char sentence[] = "error: a file was cut, or its disk was lost, while it was read\n";
    ssize_t written = write(STDERR_FILENO, sentence, sizeof sentence - 1);
    (void)signal, (void)written;
    _exit(1);
}

/* For programs, once: that ends with a sentence and status 1, and a file that may not grow any further (SIGXFSZ) is a
 * write that fails. */
static inline void safetensors_catch_signals(void) {
    struct sigaction action = {.sa_handler = safetensors_lost};
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, NULL);
    signal(SIGXFSZ, SIG_IGN);
}

/* ----------------------------------------------------------------------------------------------------
 * Writing. A file is written under a temporary name, made durable, and only then given its name, in one
 * step: whoever opens PATH finds the old file or the new one, whenever the machine stops.
 */

typedef struct SafetensorsOutput {
    FILE *file;
    char path[SAFETENSORS_MAX_PATH], temporary[SAFETENSORS_MAX_PATH];
} SafetensorsOutput;

/* Makes a directory's entries durable. File systems that cannot do this say EINVAL, and there is no more to
 * be done. */
static inline const char *safetensors_sync_directory(const char *path) {
    int descriptor = open(path, O_RDONLY);
    bool ok = descriptor >= 0 && (fsync(descriptor) == 0 || errno == EINVAL);
    const char *error =
        ok ? NULL : errorf("%s: cannot make the directory durable: %s", path, strerror(errno));
    if (descriptor >= 0) close(descriptor);
    return error;
}

/* The directory of a path: what stands before the last '/', "." if there is none. */
static inline void safetensors_parent(const char *path, char parent[SAFETENSORS_MAX_PATH]) {
    const char *slash = strrchr(path, '/');
    int length = slash ? (int)(slash - path) + (slash == path) : 0;
    snprintf(parent, SAFETENSORS_MAX_PATH, "%.*s", slash ? length : 1, slash ? path : ".");
}

/* Starts a file that is to appear as PATH: write to output->file, then commit or abort. */
static inline const char *safetensors_begin(SafetensorsOutput *output, const char *path) {
    int length = snprintf(output->temporary, SAFETENSORS_MAX_PATH, "%s.tmp.%ld", path, (long)getpid());
    if (length >= SAFETENSORS_MAX_PATH) return errorf("%.80s...: this path is too long", path);
    memcpy(output->path, path, strlen(path) + 1);
    output->file = fopen(output->temporary, "wb");
    return output->file ? NULL : errorf("%s: cannot create: %s", output->temporary, strerror(errno));
}

/* Gives up: no trace of the file is left. */
static inline void safetensors_abort(SafetensorsOutput *output) {
    if (output->file) fclose(output->file);
    output->file = NULL;
    unlink(output->temporary);
}

/* Ends the file and gives it its name. Error: the file is as it was before. */
static inline const char *safetensors_commit(SafetensorsOutput *output) {
    bool ok = fflush(output->file) == 0 && !ferror(output->file) && fsync(fileno(output->file)) == 0;
    int why = errno;
    bool closed = fclose(output->file) == 0;
    output->file = NULL;
    if (ok && !closed) why = errno;
    if (!ok || !closed || rename(output->temporary, output->path) != 0) {
        const char *error =
            errorf("%s: cannot write: %s", output->path, strerror(ok && closed ? errno : why));
        safetensors_abort(output);
        return error;
    }
    char parent[SAFETENSORS_MAX_PATH];
    safetensors_parent(output->path, parent);
    return safetensors_sync_directory(parent);
}

/* One string of __metadata__; a list of them ends with key NULL. */
typedef struct SafetensorsPair {
    const char *key, *value;
} SafetensorsPair;

/* Fills the bytes of tensor `index` (its place in the list given to safetensors_write) into out. */
typedef const char *SafetensorsFill(void *context, size_t index, void *out);

/* The tensors' checksums, to be brought into the order of their names. */
typedef struct SafetensorsSum {
    const char *name;
    uint64_t sum;
} SafetensorsSum;

static inline int safetensors_sum_by_name(const void *a, const void *b) {
    return strcmp(((const SafetensorsSum *)a)->name, ((const SafetensorsSum *)b)->name);
}

/* The value of "checksum" from the tensors' sums, which it sorts; text has SAFETENSORS_WORD (count + 1) bytes. The text
 * is as long whatever the sums are. */
static inline void safetensors_put_words(char *text, const SafetensorsTensor *tensors, size_t count,
                                         const SafetensorsPair *metadata, SafetensorsSum *sums) {
    uint64_t header = 0;
    for (size_t i = 0; i < count; i++) header += safetensors_entry_sum(&tensors[i]);
    for (; metadata && metadata->key; metadata++) header += safetensors_pair_sum(metadata->key, metadata->value);
    snprintf(text, SAFETENSORS_WORD, "%016" PRIx64, header);
    if (count > 0) qsort(sums, count, sizeof *sums, safetensors_sum_by_name);
    for (size_t i = 0; i < count; i++)
        snprintf(text + SAFETENSORS_WORD * (i + 1) - 1, SAFETENSORS_WORD + 1, " %016" PRIx64, sums[i].sum);
}

/* The header of a file with these tensors. They are laid out with the widest elements first, so that each
 * one is aligned, and in the given order among elements of one width. */
static inline void safetensors_put_header(JsonWriter *w, const SafetensorsTensor *tensors, size_t count,
                                          const SafetensorsPair *metadata, const char *checksum) {
    uint64_t offset = 0;
    json_open(w, '{');
    json_put_key(w, "__metadata__");
    json_open(w, '{');
    for (; metadata && metadata->key; metadata++) {
        json_put_key(w, metadata->key);
        json_put_string(w, metadata->value);
    }
    json_put_key(w, SAFETENSORS_CHECKSUM);
    json_put_string(w, checksum);
    json_close(w, '}');
    for (size_t width = 8; width; width /= 2) {
        for (size_t i = 0; i < count; i++) {
            if (safetensors_dtype_bytes(tensors[i].dtype) != width) continue;
            json_put_key(w, tensors[i].name);
            json_open(w, '{');
            json_put_key(w, "dtype");
            json_put_string(w, safetensors_dtype_name(tensors[i].dtype));
            json_put_key(w, "shape");
            json_open(w, '[');
            for (int k = 0; k < tensors[i].ndim; k++) json_put_int(w, tensors[i].dims[k]);
            json_close(w, ']');
            json_put_key(w, "data_offsets");
            json_open(w, '[');
            json_put_int(w, (int64_t)offset);
            offset += (uint64_t)tensors[i].size * width;
            json_put_int(w, (int64_t)offset);
            json_close(w, ']');
            json_close(w, '}');
        }
    }
    json_close(w, '}');
    while (!w->error && w->length % 8) json_put_bytes(w, " ", 1);       /* the data starts at a multiple of 8 */
}

/* The header's length and the header, where the file stands. */
static inline bool safetensors_write_header(FILE *out, const JsonWriter *header) {
    unsigned char length[8];
    for (int i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)header->length >> 8 * i);
    return fwrite(length, 1, 8, out) == 8 && fwrite(header->text, 1, header->length, out) == header->length;
}

/* The tensors' bytes, in the header's order; sums[i] becomes the checksum of tensors[i]. */
static inline const char *safetensors_put_data(FILE *out, const SafetensorsTensor *tensors, size_t count,
                                               SafetensorsFill *fill, void *context, char *buffer,
                                               SafetensorsSum *sums) {
    for (size_t width = 8; width; width /= 2) {
        for (size_t i = 0; i < count; i++) {
            if (safetensors_dtype_bytes(tensors[i].dtype) != width) continue;
            const char *error = tensors[i].data ? NULL : fill(context, i, buffer);
            if (error) return errorf("tensor %s: %s", tensors[i].name, error);
            const void *data = tensors[i].data ? tensors[i].data : buffer;
            size_t bytes = (size_t)tensors[i].size * width;
            if (!safetensors_little_endian() && !tensors[i].in_file) {
                safetensors_copy(buffer, data, (size_t)tensors[i].size, width);
                data = buffer;
            }
            sums[i] = (SafetensorsSum){tensors[i].name, safetensors_sum(0, data, bytes)};
            if (fwrite(data, 1, bytes, out) != bytes) return errorf("cannot write: %s", strerror(errno));
        }
    }
    return NULL;
}

/* What safetensors_write needs while it writes. */
typedef struct SafetensorsScratch {
    char *buffer, *words;            /* the largest tensor that is made here; the checksum as text */
    SafetensorsSum *sums;            /* one a tensor                                               */
    JsonWriter *header;
} SafetensorsScratch;

/* The whole file: the header with a checksum of zeros, the data, and once these are known the true checksum. */
static inline const char *safetensors_put_file(FILE *out, const SafetensorsTensor *tensors, size_t count,
                                               const SafetensorsPair *metadata, SafetensorsFill *fill,
                                               void *context, SafetensorsScratch *scratch) {
    size_t length = scratch->header->length;
    if (!safetensors_write_header(out, scratch->header)) return errorf("cannot write: %s", strerror(errno));
    const char *error = safetensors_put_data(out, tensors, count, fill, context, scratch->buffer, scratch->sums);
    if (error) return error;
    safetensors_put_words(scratch->words, tensors, count, metadata, scratch->sums);
    scratch->header->length = 0;
    scratch->header->comma = false;
    safetensors_put_header(scratch->header, tensors, count, metadata, scratch->words);
    if (scratch->header->error || scratch->header->length != length) return "its header has changed its length";
    if (fseek(out, 0, SEEK_SET) != 0 || !safetensors_write_header(out, scratch->header))
        return errorf("cannot write: %s", strerror(errno));
    return NULL;
}

/* Writes a file. Of each tensor: name (no two alike), dtype, ndim, dims and size are given, and data, or
 * NULL if `fill` is to make its bytes when their turn comes. metadata may be NULL; "checksum" is added to it.
 * Error: the file and why; it is as it was before. */
static inline const char *safetensors_write(const char *path, const SafetensorsTensor *tensors, size_t count,
                                            const SafetensorsPair *metadata, SafetensorsFill *fill,
                                            void *context) {
    size_t largest = 1;
    for (size_t i = 0; i < count; i++) {
        size_t bytes = (size_t)tensors[i].size * safetensors_dtype_bytes(tensors[i].dtype);
        bool as_it_is = tensors[i].data && (safetensors_little_endian() || tensors[i].in_file);
        if (!as_it_is && bytes > largest) largest = bytes;
    }
    SafetensorsOutput output;
    JsonWriter header = {0};
    SafetensorsScratch scratch = {.header = &header};
    const char *error = NULL;
    scratch.buffer = malloc(largest);
    scratch.words = malloc(SAFETENSORS_WORD * (count + 1));
    scratch.sums = calloc(count + 1, sizeof *scratch.sums);
    if (!scratch.buffer || !scratch.words || !scratch.sums)
        error = errorf("%s: out of memory for a tensor of %zu bytes", path, largest);
    if (!error) {
        for (size_t i = 0; i < count; i++) scratch.sums[i].name = tensors[i].name;
        safetensors_put_words(scratch.words, tensors, count, metadata, scratch.sums);
        safetensors_put_header(&header, tensors, count, metadata, scratch.words);
        if (header.error) error = errorf("%s: header: %s", path, header.error);
        else if (header.length > SAFETENSORS_MAX_HEADER)
            error = errorf("%s: too many tensors for one file", path);
    }
    if (!error && !(error = safetensors_begin(&output, path))) {
        error = safetensors_put_file(output.file, tensors, count, metadata, fill, context, &scratch);
        if (error) {
            error = errorf("%s: %s", path, error);
            safetensors_abort(&output);
        } else {
            error = safetensors_commit(&output);
        }
    }
    free(header.text);
    free(scratch.buffer);
    free(scratch.words);
    free(scratch.sums);
    return error;
}

#endif
