/* test_safetensors.c - the safetensors reader against damaged and hostile files, and the writer against the reader.
 *
 * A file either opens, and then all its tensors can be read, or is refused with a sentence that names it; there is no
 * third outcome. Build it with -fsanitize=address,undefined to see that nothing is read out of bounds.
 *
 *     test_safetensors [FILE...]      opens these instead of the fixtures in tests/golden
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include <dirent.h>
#include <sys/wait.h>

#include "lib/safetensors.h"
#include "tests/test.h"

static char folder[] = "/tmp/test_safetensors.XXXXXX", path[64];
static double sum;                       /* of everything read: a read that is not used might be left out */

static void put_file(const void *bytes, size_t length) {
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(bytes, 1, length, file) != length || fclose(file) != 0) die("cannot write a file in /tmp");
}

/* Makes a file from a header and so many bytes of data: 0, 1, 2, ... */
static void put_header(const char *header, size_t data) {
    size_t length = strlen(header);
    unsigned char *bytes = malloc(8 + length + data);
    if (!bytes) die("out of memory");
    for (int i = 0; i < 8; i++) bytes[i] = (unsigned char)((uint64_t)length >> 8 * i);
    memcpy(bytes + 8, header, length);
    for (size_t i = 0; i < data; i++) bytes[8 + length + i] = (unsigned char)i;
    put_file(bytes, 8 + length + data);
    free(bytes);
}

/* Opens the file and, if it opens, reads every element and every string of it. */
static const char *read_all(void) {
    Safetensors file;
    const char *error = safetensors_open(&file, path);
    if (error) return error;
    for (size_t i = 0; i < file.count; i++) {
        const SafetensorsTensor *tensor = safetensors_find(&file, file.tensors[i].name);
        if (tensor != &file.tensors[i]) error = "a tensor is not found under its own name";
        for (int64_t k = 0; k < file.tensors[i].size; k++) {
            double x = safetensors_element(&file.tensors[i], k);
            sum += isfinite(x) ? x : 1;
        }
    }
    for (const JsonNode *value = json_first(file.metadata); value; value = json_next(file.metadata, value))
        sum += (double)strlen(safetensors_metadata(&file, value->key) ? value->string : "");
    safetensors_close(&file);
    return error;
}

static const char *const good_headers[] = {      /* with 8 bytes of data each */
    "{\"a\":{\"dtype\":\"F64\",\"shape\":[],\"data_offsets\":[0,8]}}",
    "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}        ",
    "{\"a\":{\"data_offsets\":[0,8],\"shape\":[2,1,2],\"dtype\":\"BF16\"}}",
    "{\"b\":{\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[4,8]},\"a\":{\"dtype\":\"I32\",\"shape\":[1],"
    "\"data_offsets\":[0,4]}}",
    "{\"__metadata__\":{\"x\":\"y\"},\"a\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8]}}",
    "{\"a\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8]},\"__metadata__\":{}}",
    "{\"e\":{\"dtype\":\"F32\",\"shape\":[3,0],\"data_offsets\":[4,4]},\"a\":{\"dtype\":\"F32\",\"shape\":[1],"
    "\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",
    "{\"e\":{\"dtype\":\"I64\",\"shape\":[0],\"data_offsets\":[8,8]},\"a\":{\"dtype\":\"I64\",\"shape\":[1],"
    "\"data_offsets\":[0,8]},\"f\":{\"dtype\":\"I64\",\"shape\":[0],\"data_offsets\":[0,0]}}",
    "{\"\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}",
};

static const struct { const char *header, *part; } bad_headers[] = {     /* and what the sentence must say */
    {"", "starts with '{'"},
    {" {}", "starts with '{'"},
    {"[]", "starts with '{'"},
    {"null", "starts with '{'"},
    {"{}", "the tensors end at byte 0 of the data, but the file has 8"},
    {"{", "line 1, column 2"},
    {"{} x", "line 1, column 4"},
    {"{\"a\":1}", "expected dtype"},
    {"{\"a\":null}", "expected dtype"},
    {"{\"a\":[]}", "expected dtype"},
    {"{\"a\":{}}", "tensor a: expected dtype F64"},
    {"{\"a\":{\"dtype\":1,\"shape\":[2],\"data_offsets\":[0,8]}}", "found a number"},
    {"{\"a\":{\"dtype\":\"F31\",\"shape\":[2],\"data_offsets\":[0,8]}}", "found F31"},
    {"{\"a\":{\"dtype\":\"f32\",\"shape\":[2],\"data_offsets\":[0,8]}}", "found f32"},
    {"{\"a\":{\"dtype\":\"BOOL\",\"shape\":[8],\"data_offsets\":[0,8]}}", "found BOOL"},
    {"{\"a\":{\"dtype\":\"F32\\u0000\",\"shape\":[2],\"data_offsets\":[0,8]}}", "expected dtype"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":2,\"data_offsets\":[0,8]}}", "\"shape\" to be an array, found a number"},
    {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", "\"shape\" to be an array, found nothing"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2.0],\"data_offsets\":[0,8]}}", "dimension 0"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2,\"1\"],\"data_offsets\":[0,8]}}", "dimension 1"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", "negative"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-1,-2],\"data_offsets\":[0,8]}}", "negative"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,2],\"data_offsets\":[0,8]}}", "at most 8 dimensions"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[9223372036854775807],\"data_offsets\":[0,8]}}", "more elements"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", "more elements"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387906],\"data_offsets\":[0,8]}}", "more elements"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296,0],\"data_offsets\":[0,0]}}", "more elements"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]}}", "F32 [3] needs 12 bytes"},
    {"{\"a\":{\"dtype\":\"F64\",\"shape\":[2],\"data_offsets\":[0,8]}}", "F64 [2] needs 16 bytes"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,7]}}", "needs 8 bytes"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", "needs 8 bytes"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[-8,0]}}", "two integers from 0 on"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,8]}}", "two integers"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0]}}", "two integers"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8.0]}}", "two integers"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":{\"x\":0,\"y\":8}}}", "two integers"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[[0],[8]]}}", "two integers"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", "two integers"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}", "truncated"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[9223372036854775799,9223372036854775807]}}",
     "truncated"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,9223372036854775808]}}", "two integers"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", "end at byte 4 of the data, but the file"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", "start at byte 0"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"b\":{\"dtype\":\"F32\",\"shape\":[1],"
     "\"data_offsets\":[4,8]}}", "tensor b: expected it to start at byte 8"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"b\":{\"dtype\":\"F32\",\"shape\":[2],"
     "\"data_offsets\":[0,8]}}", "start at byte 8"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]},\"b\":{\"dtype\":\"U8\",\"shape\":[4],"
     "\"data_offsets\":[4,8]}}", "tensor b: expected it to start at byte 3"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"e\":{\"dtype\":\"F32\",\"shape\":[0],"
     "\"data_offsets\":[4,4]}}", "start at byte 8"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"a\":{\"dtype\":\"F32\",\"shape\":[2],"
     "\"data_offsets\":[0,8]}}", "\"a\" twice"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"more\":1}}", "unknown member \"more\""},
    {"{\"a\\u0000b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", "0 byte"},
    {"{\"__metadata__\\u0000\":{},\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", "0 byte"},
    {"{\"__metadata__\":{\"x\":\"y\\u0000z\"},\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", "0 byte"},
    {"{\"__metadata__\":{\"x\\u0000\":\"y\"},\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", "0 byte"},
    {"{\"__metadata__\":[],\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", "__metadata__"},
    {"{\"__metadata__\":{\"x\":1},\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}",
     "\"x\" to be a string"},
    {"{\"__metadata__\":{\"x\":{\"y\":\"z\"}},\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}",
     "\"x\" to be a string, found an object"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}\n{}", "line 2"},
};

static void test_headers(void) {
    for (size_t i = 0; i < sizeof good_headers / sizeof *good_headers; i++) {
        put_header(good_headers[i], 8);
        const char *error = read_all();
        check(error == NULL, "good header %zu: %s", i, error);
    }
    for (size_t i = 0; i < sizeof bad_headers / sizeof *bad_headers; i++) {
        put_header(bad_headers[i].header, 8);
        const char *error = read_all();
        if (!check(error != NULL, "bad header %zu <%s> was accepted", i, bad_headers[i].header)) continue;
        check(strstr(error, path) == error, "bad header %zu: no file name in <%s>", i, error);
        check(strstr(error, bad_headers[i].part) != NULL, "bad header %zu: expected <%s> in <%s>", i,
              bad_headers[i].part, error);
    }
    put_header(good_headers[0], 9);
    check(read_all() != NULL, "a byte after the last tensor was accepted");
    put_header("{}", 0);
    check(read_all() == NULL, "a file without tensors is a file");
}

/* The eight bytes of the length: too short a file, too long a header, lengths around what is there. */
static void test_lengths(void) {
    unsigned char bytes[64] = {2, 0, 0, 0, 0, 0, 0, 0, '{', '}'};
    for (size_t n = 0; n < 10; n++) {
        put_file(bytes, n);
        check(read_all() != NULL, "the first %zu of 10 bytes were accepted", n);
    }
    put_file(bytes, 10);
    check(read_all() == NULL, "the smallest file is a file");
    for (int bit = 0; bit < 64; bit++) {
        unsigned char changed[10];
        memcpy(changed, bytes, 10);
        changed[bit / 8] ^= (unsigned char)(1 << bit % 8);
        put_file(changed, 10);
        const char *error = read_all();
        check(error != NULL, "a header's length with bit %d changed was accepted", bit);
        if (bit > 26 && error) check(strstr(error, "the limit is") != NULL, "bit %d: <%s>", bit, error);
        else if (bit != 1 && error) check(strstr(error, "the file ends after 2") != NULL, "bit %d: <%s>", bit, error);
    }
    Safetensors file;
    check(safetensors_open(&file, "/nonexistent/file") != NULL, "a missing file was opened");
    const char *error = safetensors_open(&file, folder);
    check(error && strstr(error, "expected a file"), "a folder was opened: %s", error);
}

/* ------------------------------------------------------------------------------------------------------------------
 * The writer, and damage to what it wrote.
 */

static const double doubles[2] = {3.141592653589793, -1e300};
static const int64_t longs[3] = {INT64_MIN, 7, INT64_MAX};
static const float floats[3] = {1.5f, -0.1f, 3e38f};
static const int32_t ints[2] = {INT32_MIN, 12345};
static const uint16_t brains[4] = {0x3F80, 0xC000, 0x0001, 0x7F80};                 /* 1, -2, 2^-133, infinity */
static const uint16_t halves[6] = {0x3C00, 0xC000, 0x0001, 0x7BFF, 0xFC00, 0x8000};
static const uint8_t bytes5[5] = {0, 1, 2, 254, 255};

static const SafetensorsTensor tensors[] = {         /* odd sizes first: what follows must still be aligned */
    {.name = "bytes", .dtype = SAFETENSORS_U8, .ndim = 1, .dims = {5}, .size = 5, .data = bytes5},
    {.name = "floats", .dtype = SAFETENSORS_F32, .ndim = 2, .dims = {3, 1}, .size = 3, .data = floats},
    {.name = "scalar", .dtype = SAFETENSORS_F64, .ndim = 0, .size = 1, .data = doubles},
    {.name = "doubles", .dtype = SAFETENSORS_F64, .ndim = 1, .dims = {2}, .size = 2},
    {.name = "empty", .dtype = SAFETENSORS_F32, .ndim = 3, .dims = {2, 0, 4}, .size = 0},
    {.name = "longs", .dtype = SAFETENSORS_I64, .ndim = 1, .dims = {3}, .size = 3, .data = longs},
    {.name = "ints", .dtype = SAFETENSORS_I32, .ndim = 1, .dims = {2}, .size = 2, .data = ints},
    {.name = "brains \"\xC3\xA9\"", .dtype = SAFETENSORS_BF16, .ndim = 1, .dims = {4}, .size = 4, .data = brains},
    {.name = "halves", .dtype = SAFETENSORS_F16, .ndim = 2, .dims = {2, 3}, .size = 6, .data = halves},
};
enum { TENSORS = sizeof tensors / sizeof *tensors };
static const SafetensorsPair metadata[] = {{"format", "test"}, {"hard", "a \"b\"\\\n\xC3\xA9"}, {NULL, NULL}};

static const char *fill(void *context, size_t index, void *out) {
    if (context) return "made to fail";
    if (tensors[index].size) memcpy(out, doubles, sizeof doubles);
    return NULL;
}

/* Checks a tensor's values after a conversion to double. */
static void expect(const Safetensors *file, const char *name, const double *want, int64_t size) {
    double x[8];
    float f[8];
    const SafetensorsTensor *tensor = safetensors_find(file, name);
    if (!check(tensor && tensor->size == size, "tensor %s", name)) return;
    check((uintptr_t)tensor->data % safetensors_dtype_bytes(tensor->dtype) == 0, "tensor %s is not aligned", name);
    safetensors_to_double(tensor, x);
    for (int64_t i = 0; i < size; i++)
        check(x[i] == want[i], "%s[%" PRId64 "]: wrote %.17g, read %.17g", name, i, want[i], x[i]);
    if (tensor->dtype == SAFETENSORS_F64) return;            /* its values need not fit a float */
    safetensors_to_float(tensor, f);
    for (int64_t i = 0; i < size; i++) check(f[i] == (float)want[i], "%s[%" PRId64 "] as float", name, i);
}

static void test_round_trip(void) {
    Safetensors file;
    const char *error = safetensors_write(path, tensors, TENSORS, metadata, fill, NULL);
    if (!check(error == NULL, "write: %s", error)) return;
    error = safetensors_open(&file, path);
    if (!check(error == NULL, "open: %s", error)) return;
    check(file.count == TENSORS, "%zu tensors", file.count);
    expect(&file, "scalar", doubles, 1);
    expect(&file, "doubles", doubles, 2);
    expect(&file, "floats", (double[]){floats[0], floats[1], floats[2]}, 3);
    expect(&file, "bytes", (double[]){0, 1, 2, 254, 255}, 5);
    expect(&file, "ints", (double[]){INT32_MIN, 12345}, 2);
    expect(&file, "longs", (double[]){-9223372036854775808., 7, 9223372036854775807.}, 3);
    expect(&file, "brains \"\xC3\xA9\"", (double[]){1, -2, ldexp(1, -133), INFINITY}, 4);
    expect(&file, "halves", (double[]){1, -2, ldexp(1, -24), 65504, -INFINITY, 0}, 6);
    expect(&file, "empty", NULL, 0);
    const SafetensorsTensor *found = safetensors_find(&file, "halves");
    check(found && found->ndim == 2 && found->dims[0] == 2 && found->dims[1] == 3, "the shape of halves");
    int64_t whole[3];
    check(!safetensors_to_int64(safetensors_find(&file, "longs"), whole), "longs are integers");
    check(!memcmp(whole, longs, sizeof longs), "longs are exact");
    SafetensorsTensor in_memory = {.dtype = SAFETENSORS_I64, .ndim = 1, .dims = {3}, .size = 3, .bytes = 24};
    in_memory.data = longs;
    memset(whole, 0, sizeof whole);
    check(!safetensors_to_int64(&in_memory, whole) && !memcmp(whole, longs, sizeof longs), "longs in memory are exact");
    check(safetensors_to_int64(found, whole) != NULL, "halves were read as integers");
    check(!strcmp(safetensors_metadata(&file, "hard"), metadata[1].value), "metadata");
    check(!safetensors_metadata(&file, "none") && !safetensors_find(&file, "none"), "what is not there");
    safetensors_close(&file);
}

/* A write that fails leaves the old file and nothing else. */
static void test_failed_write(void) {
    static const SafetensorsPair latin1[] = {{"x", "\xE9"}, {NULL, NULL}};
    char missing[96];
    int failed = 1, files = 0;
    const char *error = safetensors_write(path, tensors, TENSORS, metadata, fill, &failed);
    check(error && strstr(error, "tensor doubles: made to fail"), "a fill that fails: %s", error);
    check(safetensors_write(path, tensors, TENSORS, latin1, fill, NULL) != NULL, "metadata that is not UTF-8");
    snprintf(missing, sizeof missing, "%s/none/file", folder);
    error = safetensors_write(missing, tensors, TENSORS, metadata, fill, NULL);
    check(error && strstr(error, "cannot create"), "a folder that does not exist: %s", error);
    error = safetensors_write(folder, tensors, TENSORS, metadata, fill, NULL);
    check(error && strstr(error, "cannot write"), "a folder in the file's place: %s", error);
    check(read_all() == NULL, "the old file is not there any more");
    DIR *directory = opendir(folder);
    for (struct dirent *entry; directory && (entry = readdir(directory));) files += entry->d_name[0] != '.';
    if (directory) closedir(directory);
    check(files == 1, "%d files in the folder, expected 1: was a temporary file left?", files);
    snprintf(missing, sizeof missing, "%s.tmp.%ld", folder, (long)getpid());
    check(access(missing, F_OK) != 0, "%s was left", missing);
    if (access("/dev/full", W_OK) == 0) {
        SafetensorsOutput output = {.file = fopen("/dev/full", "wb")};
        snprintf(output.path, sizeof output.path, "%s/full", folder);
        snprintf(output.temporary, sizeof output.temporary, "%s/full.tmp", folder);
        if (output.file) fprintf(output.file, "text");
        check(output.file && safetensors_commit(&output) != NULL, "a full disk was not noticed");
    } else {
        test_skip("a full disk: there is no /dev/full");
    }
}

/* Changes the file's text: `from`, which must be there, becomes `to`, of the same length. */
static void edit_file(const char *from, const char *to) {
    char *bytes;
    size_t length, size = strlen(from), at = 0;
    die_if(json_read_text(path, &bytes, &length));
    while (at + size <= length && memcmp(bytes + at, from, size) != 0) at++;
    if (check(at + size <= length && strlen(to) == size, "<%s> is not in the file", from)) memcpy(bytes + at, to, size);
    put_file(bytes, length);
    free(bytes);
}

/* What safetensors_verify says of the file; NULL if it passes. */
static const char *verify_file(void) {
    Safetensors file;
    const char *error = safetensors_open(&file, path);
    if (error) return error;
    error = safetensors_verify(&file);
    safetensors_close(&file);
    return error;
}

/* The checksums: what they notice, what they must not mind, and lists of them that are none. */
static void test_checksum(void) {
    Safetensors file;
    char first[SAFETENSORS_WORD] = "";
    die_if(safetensors_write(path, tensors, TENSORS, metadata, fill, NULL));
    check(verify_file() == NULL, "a file as it was written is refused");
    die_if(safetensors_open(&file, path));
    const char *text = safetensors_metadata(&file, SAFETENSORS_CHECKSUM);
    if (check(text && strlen(text) == SAFETENSORS_WORD * (TENSORS + 1) - 1, "the checksum <%s>", text ? text : "")) {
        memcpy(first, text, SAFETENSORS_WORD - 1);
        /* The words are a function of names and contents alone: other orders give the same ones. */
        char *words = strdup(text);
        SafetensorsTensor turned[TENSORS];
        static const SafetensorsPair pairs[] = {{"hard", "a \"b\"\\\n\xC3\xA9"}, {"format", "test"}, {NULL, NULL}};
        for (int i = 0; i < TENSORS; i++) {
            turned[i] = tensors[TENSORS - 1 - i];
            if (!turned[i].data) turned[i].data = doubles;
        }
        safetensors_close(&file);
        die_if(safetensors_write(path, turned, TENSORS, pairs, NULL, NULL));
        die_if(safetensors_open(&file, path));
        text = safetensors_metadata(&file, SAFETENSORS_CHECKSUM);
        check(text && words && strcmp(text, words) == 0, "another order changes the checksums");
        free(words);
    }
    safetensors_close(&file);
    static const struct { const char *from, *to, *part; } edits[] = {
        {"\"format\":\"test\"", "\"format\":\"tess\"", "its header: expected the checksum"},
        {"\"format\":", "\"farmot\":", "its header: expected the checksum"},
        {"\"floats\"", "\"flaots\"", "its header: expected the checksum"},
        {"\"I32\",\"shape\":[2]", "\"F32\",\"shape\":[2]", "its header: expected the checksum"},
        {"\"shape\":[3,1]", "\"shape\":[1,3]", "its header: expected the checksum"},
        {"\"checksum\"", "\"checksun\"", NULL},
    };
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
        edit_file(edits[i].from, edits[i].to);
        const char *error = verify_file();
        bool right = edits[i].part ? error && strstr(error, edits[i].part) && strstr(error, path) : !error;
        check(right, "%s: %s", edits[i].to, error ? error : "accepted");
        edit_file(edits[i].to, edits[i].from);
    }
    static const char *const words[] = {"0123456789ABCDEF", "0123456789abcde ", "-123456789abcdef", "+123456789abcdef",
                                        "0x23456789abcdef", "0123456789abcdeg"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        edit_file(first, words[i]);
        const char *error = verify_file();
        check(error && strstr(error, "to be 10 words of 16 hexadecimal digits"), "%s: %s", words[i],
              error ? error : "accepted");
        edit_file(words[i], first);
    }
    check(verify_file() == NULL, "the file as it was is refused");
    put_header("{\"__metadata__\":{\"checksum\":\"\"},\"a\":{\"dtype\":\"F64\",\"shape\":[],\"data_offsets\":[0,8]}}", 8);
    check(verify_file() != NULL, "an empty checksum was accepted");
    put_header(good_headers[0], 8);
    check(verify_file() == NULL, "a file without a checksum is refused");
    /* Sums of bytes of every length, with every byte changed. */
    uint8_t bytes[100];
    for (int i = 0; i < 100; i++) bytes[i] = (uint8_t)(i * i);
    int same = 0;
    for (size_t n = 0; n <= 100; n++) {
        uint64_t sum = safetensors_sum(0, bytes, n);
        same += n > 0 && safetensors_sum(0, bytes, n - 1) == sum;
        for (size_t i = 0; i < n; i++) {
            bytes[i] ^= 0x40;
            same += safetensors_sum(0, bytes, n) == sum;
            bytes[i] ^= 0x40;
        }
    }
    check(same == 0, "%d changes leave the sum as it is", same);
    /* These numbers are in files: they may never change. */
    uint64_t hundred = safetensors_sum(0, bytes, 100), seven = safetensors_sum(5, bytes, 7);
    check(hundred == 0xb6de024be1e43b7bu && seven == 0x54dd7a75e61dbafeu, "the sum is another one: %" PRIx64 " and %"
          PRIx64, hundred, seven);
}

/* Every truncation and every bit of the header changed, with the file on disk as it would be. */
static void test_damage(void) {
    char *good;
    size_t length, header;
    const char *error = json_read_text(path, &good, &length);
    if (!check(error == NULL, "%s", error)) return;
    header = 8 + (unsigned char)good[0] + 256 * (size_t)(unsigned char)good[1];
    for (size_t n = 0; n < length; n++) {
        put_file(good, n);
        error = read_all();
        check(error && strstr(error, path) == error, "the first %zu of %zu bytes: %s", n, length,
              error ? error : "accepted");
    }
    long accepted = 0, nameless = 0;
    for (size_t bit = 0; bit < 8 * header; bit++) {
        good[bit / 8] ^= (char)(1 << bit % 8);
        put_file(good, length);
        good[bit / 8] ^= (char)(1 << bit % 8);
        error = read_all();
        accepted += error == NULL;
        nameless += error && strstr(error, path) != error;
    }
    check(nameless == 0, "%ld errors do not name the file", nameless);
    check(accepted > 0 && accepted < (long)(8 * header) / 2, "%ld of %zu headers with a changed bit were accepted",
          accepted, 8 * header);
    put_file(good, length);
    check(read_all() == NULL, "the undamaged file");
    free(good);
}

/* A file that is cut while a program reads it: a sentence and status 1, not a signal. */
static void test_lost(void) {
    int output[2], status = 0;
    char sentence[128] = "";
    const size_t size = 1 << 20;
    char *header = malloc(128), *data = calloc(size, 1);
    if (!header || !data || pipe(output) != 0) die("no memory, or no pipe");
    snprintf(header, 128, "{\"a\":{\"dtype\":\"U8\",\"shape\":[%zu],\"data_offsets\":[0,%zu]}}", size, size);
    put_header(header, size);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        Safetensors file;
        dup2(output[1], STDERR_FILENO);
        safetensors_catch_signals();
        die_if(safetensors_open(&file, path));
        if (truncate(path, 4096) != 0) _exit(2);
        for (int64_t i = 0; i < file.tensors[0].size; i++) sum += safetensors_element(&file.tensors[0], i);
        _exit(3);
    }
    close(output[1]);
    ssize_t length = read(output[0], sentence, sizeof sentence - 1);
    close(output[0]);
    waitpid(child, &status, 0);
    check(length > 0 && strstr(sentence, "error: a file was cut") && WIFEXITED(status) && WEXITSTATUS(status) == 1,
          "a file that was cut: status %x, <%s>", (unsigned)status, sentence);
    free(header);
    free(data);
}

/* Opens real files and looks at what every fixture has. */
static void test_file(const char *name) {
    Safetensors file;
    double loss = NAN;
    const char *error = safetensors_open(&file, name);
    if (!check(error == NULL, "%s", error)) return;
    const char *format = safetensors_metadata(&file, "format");
    const SafetensorsTensor *tensor = safetensors_find(&file, "loss");
    check(file.count > 0, "%s: no tensors", name);
    if (format && strcmp(format, "megalodon-fixture-1") == 0) {
        if (tensor && tensor->size == 1) safetensors_to_double(tensor, &loss);
        check(loss > 0 && loss < 100, "%s: loss %g", name, loss);
    }
    safetensors_close(&file);
}

int main(int argc, char **argv) {
    static const char *const golden[] = {"base", "carry", "long", "noaffine", "odd", "short", "swiglu", "train"};
    test_begin("safetensors");
    if (!mkdtemp(folder)) die("cannot create a folder in /tmp");
    snprintf(path, sizeof path, "%s/file", folder);
    test_headers();
    test_lengths();
    test_round_trip();
    test_failed_write();
    test_damage();
    test_checksum();
    test_lost();
    for (int i = 1; i < argc; i++) test_file(argv[i]);
    for (size_t i = 0; argc == 1 && i < sizeof golden / sizeof *golden; i++) {
        char name[64];
        snprintf(name, sizeof name, "tests/golden/%s.safetensors", golden[i]);
        if (access("tests/golden", R_OK) == 0) test_file(name);
        else test_skip("tests/golden is not in the current folder");
    }
    check(isfinite(sum), "the sum of everything read");
    unlink(path);
    rmdir(folder);
    return test_end();
}
