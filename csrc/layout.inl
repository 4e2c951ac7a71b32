// Where the weights of one tensor lie among all weights: the rows of the `places` and `chunks` tables.
//
// The global index of a weight is its position in the concatenation of all full, unsharded tensors. It decides ties and
// seeds stochastic rounding, so that results depend neither on sharding nor on launch order.
//
// No includes here, as in criterion.inl: include after it, in the same namespace.

// Weights per row of `chunks`; pins_ext/ops/layout.py CHUNK. A chunk at a tensor's end is shorter.
constexpr int64_t kChunk = 16384;

// Weights of a row that share a scale in 8-bit storage: 32 bytes and a bf16 scale. The last group of a row is filled
// up.
constexpr int64_t kGroup = 32;
constexpr int64_t kGroupBytes = kGroup + 2;

// One row of `places`: sizes are right-aligned, whole trailing dimensions merged.
struct Place {
  int64_t base;      // global index of the full tensor's first weight
  int64_t full[4];   // sizes of the full tensor
  int64_t local[4];  // sizes of the local tensor
  int64_t start[4];  // first index of the local tensor in each dimension
  int64_t columns;   // weights of a row of the local tensor
};
static_assert(sizeof(Place) == 14 * sizeof(int64_t), "a row of the table of places");

// One row of `chunks`.
struct Chunk {
  int64_t tensor;
  int64_t offset;  // local index of the chunk's first weight
};
static_assert(sizeof(Chunk) == 2 * sizeof(int64_t), "a row of the work list");

PINS_HD int64_t numel_of(const Place& place) {
  return place.local[0] * place.local[1] * place.local[2] * place.local[3];
}

// Global index of local weight i: unravel in the local sizes, shift by start, ravel in the full sizes.
PINS_HD int64_t global_index(const Place& place, int64_t i) {
  int64_t index = place.base;
  int64_t stride = 1;
  for (int d = 3; d >= 0; --d) {
    index += (place.start[d] + i % place.local[d]) * stride;
    i /= place.local[d];
    stride *= place.full[d];
  }
  return index;
}

// Whether the local tensor is the full one: global indices follow its own.
PINS_HD bool is_whole(const Place& place) {
  return place.local[0] == place.full[0] && place.local[1] == place.full[1] && place.local[2] == place.full[2] &&
         place.local[3] == place.full[3];
}

// How many of n weights from local index `offset` on have a global index below `index`: local order is global order.
PINS_HD int64_t weights_before(const Place& place, int64_t offset, int64_t n, int64_t index) {
  if (n == 0 || global_index(place, offset) >= index) return 0;
  if (global_index(place, offset + n - 1) < index) return n;
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (global_index(place, offset + middle) < index) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Groups of a row of 8-bit storage.
PINS_HD int64_t groups_of(int64_t columns) { return (columns + kGroup - 1) / kGroup; }

// Groups of a tensor that begin before its local weight i.
PINS_HD int64_t groups_before(int64_t columns, int64_t i) {
  return i / columns * groups_of(columns) + groups_of(i % columns);
}

// The first local weight from i on that begins a group.
PINS_HD int64_t next_group(int64_t columns, int64_t i) {
  const int64_t column = i % columns, next = groups_of(column) * kGroup;
  return i - column + (next < columns ? next : columns);
}

// From local weight i on, this many weights have consecutive global indices. A whole tensor is one run.
PINS_HD int64_t run_length(const Place& place, int64_t i) { return place.local[3] - i % place.local[3]; }
