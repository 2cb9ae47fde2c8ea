/* fuzz_safetensors.c - lib/safetensors.h: any file is refused with a sentence, or its tensors can be read to the last
 * byte, and a file into which they are written holds the same. */
#include "fuzz.h"

#include "lib/safetensors.h"

enum { MOST = 1 << 16 };             /* elements that one tensor's numbers are converted for */
static double numbers[MOST];
static float floats[MOST];
static int64_t integers[MOST];

/* Reads all that a file claims to have. */
static void read_tensors(const Safetensors *file) {
    size_t bytes = 0;
    for (size_t i = 0; i < file->count; i++) {
        const SafetensorsTensor *tensor = &file->tensors[i];
        expect(safetensors_find(file, tensor->name) == tensor, "%s is not found", tensor->name);
        expect(tensor->bytes == (size_t)tensor->size * safetensors_dtype_bytes(tensor->dtype), "another size");
        bytes += tensor->bytes;
        if (tensor->size > MOST) continue;
        safetensors_to_double(tensor, numbers);
        safetensors_to_float(tensor, floats);
        const char *error = safetensors_to_int64(tensor, integers);
        expect_sentence(error);
        for (int64_t k = 0; k < tensor->size && !error; k++)
            expect((double)integers[k] == numbers[k], "%s: two values of number %d", tensor->name, (int)k);
    }
    expect(bytes <= file->map_bytes, "%zu bytes of tensors in a file of %zu", bytes, file->map_bytes);
}

/* Writes the tensors to a file of the same kind and compares. */
static void write_again(const Safetensors *file) {
    static char path[64];
    Safetensors again;
    if (!path[0]) snprintf(path, sizeof path, "/dev/shm/fuzz_safetensors.%d", (int)getpid());
    const char *error = safetensors_write(path, file->tensors, file->count, NULL, NULL, NULL);
    expect(!error, "cannot write what was read: %s", error);
    error = safetensors_open(&again, path);
    unlink(path);
    expect(!error, "cannot read what was written: %s", error);
    expect(!(error = safetensors_verify(&again)), "%s", error);
    expect(again.count == file->count, "%zu tensors have become %zu", file->count, again.count);
    for (size_t i = 0; i < file->count; i++) {
        const SafetensorsTensor *a = &file->tensors[i], *b = &again.tensors[i];
        expect(strcmp(a->name, b->name) == 0 && a->dtype == b->dtype && a->ndim == b->ndim && a->bytes == b->bytes &&
               memcmp(a->dims, b->dims, (size_t)a->ndim * sizeof *a->dims) == 0, "%s is another tensor", a->name);
        expect(memcmp(a->data, b->data, a->bytes) == 0, "%s has other bytes", a->name);
    }
    safetensors_close(&again);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    static FuzzFile input;
    static uint64_t accepted;
    Safetensors file;
    fuzz_safetensors_file(&input, bytes, size);
    const char *error = safetensors_open(&file, input.path);
    expect_sentence(error);
    if (error) return 0;
    expect_sentence(safetensors_verify(&file));
    read_tensors(&file);
    if (accepted++ % 16 == 0) write_again(&file);            /* slower than all the rest */
    safetensors_close(&file);
    return 0;
}
