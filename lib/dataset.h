/* dataset.h - tokens for training: the bytes of text files, or the entries of .npy files.
 *
 * A dataset is one file, or a folder whose files follow one another in the order of their names. A file whose name
 * ends in .npy holds token numbers (one dimension, uint16 or uint32, little-endian); of any other file each byte is a
 * token. The two kinds do not mix.
 *
 * Windows are read with pread when they are asked for. Mapping the files would save a copy, but a mapped file that
 * shrinks or lies on a failing disk ends the program with a signal; a read ends with a sentence.
 */
#ifndef LIB_DATASET_H
#define LIB_DATASET_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"

enum { DATASET_NPY_HEADER_MAX = 4096, DATASET_BLOCK = 1 << 16 };
/* Up to this many bytes are hashed whole; of larger data, evenly spread blocks that add up to it. */
#define DATASET_HASH_BYTES ((int64_t)64 << 20)

typedef struct DatasetFile {
    char *path;
    int64_t bytes;               /* size of the file                                  */
    int64_t start;               /* byte at which the tokens start                    */
    int64_t first, count;        /* its tokens are [first, first + count) of the data */
} DatasetFile;

typedef struct Dataset {
    char *path;                  /* as given                                                     */
    DatasetFile *files;
    int num_files;
    int width;                   /* bytes a token: 1 (text), 2 or 4 (.npy)                       */
    bool text;                   /* tokens are the bytes of text: losses can be told in bits per byte */
    int vocab_size;              /* every token is checked against it as it is read              */
    int64_t size;                /* tokens                                                       */
    int open_file, descriptor;   /* the file that was read last stays open; -1: none             */
} Dataset;

static inline void dataset_close(Dataset *ds) {
    if (ds->descriptor >= 0) close(ds->descriptor);
    for (int i = 0; i < ds->num_files; i++) free(ds->files[i].path);
    free(ds->files);
    free(ds->path);
    memset(ds, 0, sizeof *ds);
    ds->descriptor = ds->open_file = -1;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Reading.
 */

/* Reads exactly `bytes` bytes of file i from `offset` on. Error: file and reason. */
static inline const char *dataset_read(Dataset *ds, int i, int64_t offset, void *out, size_t bytes) {
    const char *path = ds->files[i].path;
    if (ds->open_file != i) {
        if (ds->descriptor >= 0) close(ds->descriptor);
        ds->open_file = -1;
        ds->descriptor = open(path, O_RDONLY | O_CLOEXEC);
        if (ds->descriptor < 0) return errorf("%s: cannot be opened: %s", path, strerror(errno));
        ds->open_file = i;
    }
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pread(ds->descriptor, (char *)out + done, bytes - done, (off_t)(offset + (int64_t)done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return errorf("%s: cannot be read: %s", path, strerror(errno));
        if (n == 0) return errorf("%s: ends at byte %lld, but it had %lld bytes when it was opened; leave the data "
                                  "alone while it is in use", path, (long long)(offset + (int64_t)done),
                                  (long long)ds->files[i].bytes);
        done += (size_t)n;
    }
    return NULL;
}

/* ------------------------------------------------------------------------------------------------------------------
 * The .npy header: magic, version, length, then a Python dict such as
 * {'descr': '<u2', 'fortran_order': False, 'shape': (1000,), } padded with spaces to a line feed.
 */

typedef struct NpyText { const char *at, *end; } NpyText;

static inline void npy_spaces(NpyText *t) {
    while (t->at < t->end && *t->at == ' ') t->at++;
}

/* Skips spaces and then `word`, if it stands there. */
static inline bool npy_take(NpyText *t, const char *word) {
    size_t n = strlen(word);
    npy_spaces(t);
    if ((size_t)(t->end - t->at) < n || memcmp(t->at, word, n) != 0) return false;
    t->at += n;
    return true;
}

/* A quoted word without escapes. */
static inline bool npy_string(NpyText *t, char *out, size_t size) {
    size_t n = 0;
    npy_spaces(t);
    if (t->at == t->end || (*t->at != '\'' && *t->at != '"')) return false;
    char quote = *t->at++;
    while (t->at < t->end && *t->at != quote && *t->at != '\\' && n + 1 < size) out[n++] = *t->at++;
    out[n] = 0;
    return t->at < t->end && *t->at++ == quote;
}

/* A shape of one dimension: (N,) */
static inline bool npy_shape(NpyText *t, int64_t *count) {
    int64_t n = 0;
    int digits = 0;
    if (!npy_take(t, "(")) return false;
    npy_spaces(t);
    for (; t->at < t->end && *t->at >= '0' && *t->at <= '9'; digits++) {
        if (n > (INT64_MAX >> 8) / 10) return false;
        n = 10 * n + (*t->at++ - '0');
    }
    *count = n;
    return digits > 0 && npy_take(t, ",") && npy_take(t, ")");
}

/* Parses the dict in header[0, length). Returns what is wrong with it as a fragment, or NULL. */
static inline const char *npy_parse(const char *header, size_t length, int *width, int64_t *count) {
    NpyText t = {header, header + length};
    bool descr = false, order = false, shape = false;
    char key[16], value[16];
    if (!npy_take(&t, "{")) return "its header does not start with {";
    while (!npy_take(&t, "}")) {
        if (!npy_string(&t, key, sizeof key) || !npy_take(&t, ":")) return "its header is not a dict of names";
        if (strcmp(key, "descr") == 0 && !descr) {
            descr = true;
            if (!npy_string(&t, value, sizeof value)) return "its descr is not a simple type";
            *width = strcmp(value, "<u2") == 0 ? 2 : strcmp(value, "<u4") == 0 ? 4 : 0;
            if (!*width)
                return errorf("its type is %s%s, neither <u2 nor <u4 (little-endian uint16 or uint32)", value,
                              *value == '>' ? ", big-endian" : "");
        } else if (strcmp(key, "fortran_order") == 0 && !order) {
            order = true;
            if (!npy_take(&t, "False") && !npy_take(&t, "True")) return "its fortran_order is not True or False";
        } else if (strcmp(key, "shape") == 0 && !shape) {
            shape = true;
            if (!npy_shape(&t, count)) return "its shape is not one dimension, such as (1000,)";
        } else {
            return "its header has an unknown or repeated name";
        }
        if (!npy_take(&t, ",")) {
            if (npy_take(&t, "}")) break;
            return "its header lacks a comma";
        }
    }
    npy_spaces(&t);
    if (t.end - t.at != 1 || *t.at != '\n') return "its header does not end in a line feed";
    return descr && order && shape ? NULL : "its header lacks descr, fortran_order or shape";
}

/* Reads the header of file i: sets its start and count and tells the width. Error: what is wrong with the file. */
static inline const char *dataset_open_npy(Dataset *ds, int i, int *width) {
    static const char hint[] = "expected what numpy.save writes for one dimension of uint16 or uint32: "
                               "numpy.save(NAME, tokens.astype('<u2'))";
    DatasetFile *file = &ds->files[i];
    uint8_t head[12];
    char header[DATASET_NPY_HEADER_MAX];
    if (file->bytes < 12) return errorf("%s: has %lld bytes, too few for a .npy file; %s", file->path,
                                        (long long)file->bytes, hint);
    const char *error = dataset_read(ds, i, 0, head, sizeof head);
    if (error) return error;
    if (memcmp(head, "\x93NUMPY", 6) != 0) return errorf("%s: is not a .npy file; %s", file->path, hint);
    if (head[6] < 1 || head[6] > 3 || head[7] != 0)
        return errorf("%s: is .npy version %d.%d; expected 1.0, 2.0 or 3.0", file->path, head[6], head[7]);
    int64_t prefix = head[6] == 1 ? 10 : 12;
    int64_t length = head[8] | head[9] << 8;
    if (head[6] > 1) length |= (int64_t)head[10] << 16 | (int64_t)head[11] << 24;
    if (length > DATASET_NPY_HEADER_MAX || prefix + length > file->bytes)
        return errorf("%s: its header of %lld bytes is too long (the file has %lld bytes)", file->path,
                      (long long)length, (long long)file->bytes);
    error = dataset_read(ds, i, prefix, header, (size_t)length);
    if (error) return error;
    const char *wrong = npy_parse(header, (size_t)length, width, &file->count);
    if (wrong) return errorf("%s: %s; %s", file->path, wrong, hint);
    file->start = prefix + length;
    if (file->count != (file->bytes - file->start) / *width || (file->bytes - file->start) % *width)
        return errorf("%s: its header tells of %lld tokens of %d bytes, but %lld bytes follow it", file->path,
                      (long long)file->count, *width, (long long)(file->bytes - file->start));
    return NULL;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Opening.
 */

static inline bool dataset_has_ending(const char *path, const char *ending) {
    size_t n = strlen(path), m = strlen(ending);
    return n > m && strcmp(path + n - m, ending) == 0;
}
static inline bool dataset_is_npy(const char *path) { return dataset_has_ending(path, ".npy"); }

/* A file of JSON objects, one a line, is no dataset: examples.h and ./tokenize read it. */
static inline bool dataset_is_jsonl(const char *path) { return dataset_has_ending(path, ".jsonl"); }

/* Adds one regular file. Takes over `path`. */
static inline const char *dataset_add(Dataset *ds, char *path) {
    struct stat info;
    DatasetFile *files = realloc(ds->files, (size_t)(ds->num_files + 1) * sizeof *files);
    if (!path || !files) {
        free(path);
        if (files) ds->files = files;
        return errorf("%s: no memory for the list of its files", ds->path);
    }
    int i = ds->num_files++, width = 1;
    ds->files = files;
    files[i] = (DatasetFile){.path = path};
    if (stat(path, &info) != 0) return errorf("%s: cannot be opened: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode))
        return errorf("%s: is not a regular file; a folder of data may hold only files", path);
    files[i].bytes = info.st_size;
    files[i].count = files[i].bytes;
    bool text = !dataset_is_npy(path);
    if (dataset_is_jsonl(path))
        return errorf("%s: holds examples, not a text; name it alone to ./train --data or ./tokenize --data, which read "
                      "its lines, or give it another ending if its bytes are the text", path);
    const char *error = text ? NULL : dataset_open_npy(ds, i, &width);
    if (error) return error;
    if (i == 0) {
        ds->text = text;
        ds->width = width;
    } else if (ds->width != width || ds->text != text) {
        return errorf("%s: its tokens have %d bytes%s, those of %s %d%s; the files of a folder must be of one kind",
                      path, width, text ? " (text)" : " (.npy)", files[0].path, ds->width,
                      ds->text ? " (text)" : " (.npy)");
    }
    files[i].first = ds->size;
    ds->size += files[i].count;
    return NULL;
}

static inline int dataset_by_name(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Adds the files of a folder in the order of their names (as bytes); names that start with a dot are left out. */
static inline const char *dataset_add_folder(Dataset *ds) {
    DIR *folder = opendir(ds->path);
    if (!folder) return errorf("%s: cannot be opened: %s", ds->path, strerror(errno));
    char **names = NULL;
    size_t count = 0;
    const char *error = NULL;
    const char *slash = ds->path[strlen(ds->path) - 1] == '/' ? "" : "/";
    for (struct dirent *entry; !error && (entry = readdir(folder));) {
        if (entry->d_name[0] == '.') continue;
        size_t size = strlen(ds->path) + strlen(entry->d_name) + 2;
        char **longer = realloc(names, (count + 1) * sizeof *names), *path = malloc(size);
        if (longer) names = longer;
        if (longer && path) {
            snprintf(path, size, "%s%s%s", ds->path, slash, entry->d_name);
            names[count++] = path;
        } else {
            free(path);
            error = errorf("%s: no memory for the list of its files", ds->path);
        }
    }
    closedir(folder);
    if (count > 0) qsort(names, count, sizeof *names, dataset_by_name);
    for (size_t i = 0; i < count; i++) {
        if (error) free(names[i]);
        else error = dataset_add(ds, names[i]);
    }
    free(names);
    return error;
}

/* Opens a file or a folder. Tokens must lie in [0, vocab_size), which is checked as they are read. Error: the file
 * and what is wrong with it; nothing stays open then. */
static inline const char *dataset_open(Dataset *ds, const char *path, int vocab_size) {
    struct stat info;
    memset(ds, 0, sizeof *ds);
    ds->descriptor = ds->open_file = -1;
    ds->vocab_size = vocab_size;
    if (!*path || stat(path, &info) != 0)
        return errorf("%s: cannot be opened: %s", path, *path ? strerror(errno) : "the name is empty");
    size_t size = strlen(path) + 1;
    char *copy = malloc(size);
    ds->path = malloc(size);
    if (!copy || !ds->path) {
        free(copy);
        return errorf("%s: no memory for its name", path);
    }
    memcpy(copy, path, size);
    memcpy(ds->path, path, size);
    const char *error;
    if (S_ISDIR(info.st_mode)) {
        free(copy);
        error = dataset_add_folder(ds);
        if (!error && ds->num_files == 0) error = errorf("%s: the folder holds no files", path);
    } else {
        error = dataset_add(ds, copy);
    }
    if (!error && ds->size == 0) error = errorf("%s: is empty; expected text or tokens", path);
    if (error) dataset_close(ds);
    return error;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Windows and identity.
 */

/* Index of the file that holds token `offset`. */
static inline int dataset_file_of(const Dataset *ds, int64_t offset) {
    int low = 0, high = ds->num_files - 1;
    while (low < high) {
        int middle = low + (high - low + 1) / 2;
        if (ds->files[middle].first <= offset) low = middle;
        else high = middle - 1;
    }
    return low;
}

/* Copies tokens [offset, offset + length) to out: int32, length entries. Error: the window does not lie in the data, a
 * file cannot be read, or a token is not in the vocabulary (file, position, value). */
static inline const char *dataset_window(Dataset *ds, int64_t offset, int64_t length, int32_t *out) {
    uint8_t block[DATASET_BLOCK];
    if (offset < 0 || length < 0 || offset > ds->size || length > ds->size - offset)
        return errorf("%s: has %lld tokens; %lld tokens from %lld on were asked for", ds->path, (long long)ds->size,
                      (long long)length, (long long)offset);
    while (length > 0) {
        int i = dataset_file_of(ds, offset);
        const DatasetFile *file = &ds->files[i];
        int64_t at = offset - file->first, n = file->count - at;
        if (n > length) n = length;
        if (n > DATASET_BLOCK / ds->width) n = DATASET_BLOCK / ds->width;
        const char *error = dataset_read(ds, i, file->start + at * ds->width, block, (size_t)(n * ds->width));
        if (error) return error;
        for (int64_t t = 0; t < n; t++) {
            uint32_t token = 0;
            /* Byte by byte, so that a big-endian machine reads the same numbers. */
            for (int b = ds->width - 1; b >= 0; b--) token = token << 8 | block[t * ds->width + b];
            if (token >= (uint32_t)ds->vocab_size)
                return errorf("%s: token %lld is %lu, but the model knows only 0 to %d; it needs another --vocab-size, or "
                              "the data was made by another tokenizer",
                              file->path, (long long)(at + t), (unsigned long)token, ds->vocab_size - 1);
            out[t] = (int32_t)token;
        }
        out += n;
        offset += n;
        length -= n;
    }
    return NULL;
}

/* Reads all tokens once, or of large data evenly spread windows that add up to DATASET_HASH_BYTES, so that a token
 * outside of the vocabulary is found before a run and not hours later. Error: as dataset_window. */
static inline const char *dataset_check(Dataset *ds) {
    enum { WINDOW = 1 << 14 };
    int32_t window[WINDOW];
    int64_t stride = WINDOW, most = DATASET_HASH_BYTES / ds->width;
    const char *error = NULL;
    if (ds->vocab_size > 255 && ds->text) return NULL;       /* every byte is a token */
    if (ds->size > most) stride = ds->size / (most / WINDOW);
    for (int64_t at = 0; at < ds->size && !error; at += stride)
        error = dataset_window(ds, at, ds->size - at < WINDOW ? ds->size - at : WINDOW, window);
    return error;
}

/* A number that tells whether this is the same data as last time: over the sizes of all files and their bytes, or
 * evenly spread blocks of them beyond DATASET_HASH_BYTES. It does not depend on the names. */
static inline const char *dataset_hash(Dataset *ds, uint64_t *hash) {
    uint64_t h = 0xcbf29ce484222325u;                       /* FNV-1a, 64 bits */
    const uint64_t prime = 0x100000001b3u;
    uint8_t block[DATASET_BLOCK];
    int64_t total = 0;
    for (int i = 0; i < ds->num_files; i++) total += ds->files[i].bytes;
    int64_t stride = DATASET_BLOCK;
    if (total > DATASET_HASH_BYTES) stride = total / (DATASET_HASH_BYTES / DATASET_BLOCK);
    for (int i = 0; i < ds->num_files; i++) {
        h = (h ^ (uint64_t)ds->files[i].bytes) * prime;
        for (int64_t at = 0; at < ds->files[i].bytes; at += stride) {
            int64_t n = ds->files[i].bytes - at < DATASET_BLOCK ? ds->files[i].bytes - at : DATASET_BLOCK;
            const char *error = dataset_read(ds, i, at, block, (size_t)n);
            if (error) return error;
            for (int64_t b = 0; b < n; b++) h = (h ^ block[b]) * prime;
        }
    }
    *hash = h;
    return NULL;
}

#endif
