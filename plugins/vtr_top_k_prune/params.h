// What the kernels are told, and how their work is divided. Plain C++: included by the kernels, by
// the host that launches them and by the tests; vtr_export/backends/tensorrt/kernel.py mirrors it.
#pragma once

#ifndef VTR_BOTH
#ifdef __CUDACC__
#define VTR_BOTH __host__ __device__ inline
#else
#define VTR_BOTH inline
#endif
#endif

// One call. Pointers first, so that every compiler lays it out alike (152 bytes).
struct VtrTopKPruneParams {
    const void* query;                  // [batch, heads, query_rows, head_dim]; the last rows ask
    const void* keys;                   // [batch, kv_heads, total, head_dim]
    const unsigned char* mask;          // bool [batch, 1, mask_rows, total]; of the rows that ask, the last
                                        // of which says who is real
    const long long* vision_index;      // [batch, vision], ascending columns of hidden
    const long long* budget;            // [batch] tokens to rank, or (per_image) [1] images
    const void* hidden;                 // [batch, length, width]
    void* kept_hidden;                  // [batch, length - vision + keep, width]
    long long* indices;                 // [batch, length - vision + keep]
    long long* kept_vision_index;       // [batch, keep]
    unsigned char* workspace;           // vtr_workspace_bytes(), aligned to 256, of any content
    int batch, heads, kv_heads, head_dim;
    int query_rows, mask_rows;
    int total;                          // keys: past + length
    int length;                         // columns of hidden
    int vision, keep;                   // keep <= vision <= length
    int row_bytes;                      // of one row of hidden
    int chunk;                          // keys of one block of the first launch
    int tiles;                          // blocks that gather one row of the batch
    float scale;
    int max_heads;                      // 0: mean over heads, 1: their maximum
    int per_image;                      // 0: rank all tokens of a row jointly, 1: image by image
    int wide;                           // 1: keys are read 16 bytes at a time
    int text;                           // 0: the last row asks, 1: the rows of text behind the images
};

constexpr int VTR_MAX_HEAD_DIM = 512;
constexpr int VTR_LEAST_CHUNK = 32, VTR_MOST_CHUNK = 256;
constexpr int VTR_MOST_HEADS = 8;       // queries in one pass over the keys
constexpr int VTR_TEXT_BLOCKS = 1024;   // that a launch of "text" should have
constexpr int VTR_ITEM = 128;           // vision tokens whose heads one block reduces at a time

VTR_BOTH long long vtr_divide_up(long long count, long long by) { return (count + by - 1) / by; }
VTR_BOTH long long vtr_align(long long bytes) { return vtr_divide_up(bytes, 256) * 256; }

// Whether anything has to be ranked: else one launch copies.
VTR_BOTH bool vtr_is_ranked(const VtrTopKPruneParams& p) { return 0 < p.keep && p.keep < p.vision; }

// Columns that survive in each row.
VTR_BOTH int vtr_kept(const VtrTopKPruneParams& p) { return p.length - p.vision + p.keep; }

// Keys of one block: about 512 blocks if the call is large enough.
VTR_BOTH int vtr_chunk(int batch, int kv_heads, int total) {
    const long long share = vtr_divide_up(1LL * batch * kv_heads * total, 512);
    const long long chunk = vtr_divide_up(share, VTR_LEAST_CHUNK) * VTR_LEAST_CHUNK;
    return (int)(chunk < VTR_MOST_CHUNK ? chunk : VTR_MOST_CHUNK);
}

// Blocks for one row of the batch: at least 32 KiB each, and all of them resident at once.
VTR_BOTH int vtr_tiles(const VtrTopKPruneParams& p, int multiprocessors) {
    const long long most = multiprocessors > p.batch ? multiprocessors / p.batch : 1;
    const long long copies = vtr_divide_up(1LL * vtr_kept(p) * p.row_bytes, 32 << 10);
    const long long merges = vtr_is_ranked(p) ? vtr_divide_up(p.vision, VTR_ITEM) : 1;
    const long long wanted = copies > merges ? copies : merges;
    return (int)(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

// ---- query "text": the last ``vtr_rows`` rows of the call may ask ----

VTR_BOTH int vtr_rows(const VtrTopKPruneParams& p) {
    return p.length > p.vision ? p.length - p.vision : 1;
}

// Rows whose heads of one group are multiplied together, as a power of two: VTR_MOST_HEADS pairs of
// row and head, or one row of a larger group.
VTR_BOTH int vtr_row_shift(const VtrTopKPruneParams& p) {
    const int group = p.heads / p.kv_heads;
    return group == 1 ? 3 : group == 2 ? 2 : group <= VTR_MOST_HEADS / 2 ? 1 : 0;
}
VTR_BOTH int vtr_row_tiles(const VtrTopKPruneParams& p, int rows) {
    return (int)vtr_divide_up(rows, 1 << vtr_row_shift(p));
}

// Blocks that share the keys of one tile of rows, where rows alone are too few.
VTR_BOTH int vtr_key_splits(const VtrTopKPruneParams& p) {
    const long long tiles = 1LL * p.batch * p.kv_heads * vtr_row_tiles(p, vtr_rows(p));
    const long long wanted = vtr_divide_up(VTR_TEXT_BLOCKS, tiles);
    const long long most = vtr_divide_up(p.total, VTR_MOST_CHUNK);
    return (int)(wanted < most ? wanted : most);
}

// Blocks that share the rows which VTR_ITEM vision tokens are asked by.
VTR_BOTH int vtr_row_splits(const VtrTopKPruneParams& p) {
    const long long wanted = vtr_divide_up(VTR_TEXT_BLOCKS, p.batch * vtr_divide_up(p.vision, VTR_ITEM));
    const long long most = vtr_row_tiles(p, vtr_rows(p));
    return (int)(wanted < most ? wanted : most);
}

// ---- workspace ----

// Where each part begins: two counters and what is known of the asking rows, for each row of the
// batch; the ranks; statistics; logits or (text) sums over rows. A profile's largest shape needs the
// most of all its shapes: statistics have room for the smallest chunks, and of ``text``, whose rows
// grow as the vision tokens shrink, for rows as many as columns.
VTR_BOTH long long vtr_ranks_at(const VtrTopKPruneParams& p) { return vtr_align(16LL * p.batch); }
VTR_BOTH long long vtr_statistics_at(const VtrTopKPruneParams& p) {
    return vtr_ranks_at(p) + vtr_align(4LL * p.batch * p.vision);
}
VTR_BOTH long long vtr_logits_at(const VtrTopKPruneParams& p) {
    const long long chunks = vtr_divide_up(p.total, VTR_LEAST_CHUNK);
    return vtr_statistics_at(p) + vtr_align(8LL * p.batch * p.heads * chunks);
}
VTR_BOTH long long vtr_sums_at(const VtrTopKPruneParams& p) {
    const long long tiles = 1LL * p.batch * p.kv_heads * vtr_row_tiles(p, p.length);
    const long long group = p.heads / p.kv_heads, pairs = group < VTR_MOST_HEADS ? VTR_MOST_HEADS : group;
    return vtr_statistics_at(p) + vtr_align(8 * (tiles + VTR_TEXT_BLOCKS) * pairs);
}
VTR_BOTH long long vtr_workspace_bytes(const VtrTopKPruneParams& p) {
    if (!p.text) return vtr_logits_at(p) + vtr_align(4LL * p.batch * p.heads * p.length);
    const long long blocks = p.batch * vtr_divide_up(p.vision, VTR_ITEM) + VTR_TEXT_BLOCKS;
    return vtr_sums_at(p) + vtr_align(4 * blocks * VTR_ITEM);
}

// Shared memory of a block of the last launch: each head's maximum and sum, two bitmaps over the
// columns and the bits before each of their words.
VTR_BOTH int vtr_words(const VtrTopKPruneParams& p) { return (p.length + 31) / 32; }
VTR_BOTH long long vtr_shared_bytes(const VtrTopKPruneParams& p) {
    return 8LL * p.heads + 16LL * vtr_words(p);
}
