// The masked optimizer step where statistics or moments are in 8 bits: a warp takes a group of 32 weights at a time,
// a lane a weight of it, for the scale of the group is the largest of what its lanes store. Device code alone: include
// after update.cuh, in the same namespace.

// How lists are stored: chosen at run time, alike for all threads, for there are too many combinations to compile.
enum class Kind : int { float32, bfloat16, float16, code8, signed8 };

struct Stored {
  Kind params, ipt, moments[2];
};

// ---- one weight -------------------------------------------------------------------------------------------------

__device__ inline float load_as(Kind kind, const void* stream, int64_t i) {
  if (kind == Kind::float32) return load(read<1>(static_cast<const float*>(stream) + i).at[0]);
  if (kind == Kind::bfloat16) return load(read<1>(static_cast<const BFloat16*>(stream) + i).at[0]);
  return load(read<1>(static_cast<const Float16*>(stream) + i).at[0]);
}

template <typename T>
__device__ void store_one(void* stream, int64_t i, float x, uint32_t random16) {
  Pack<T, 1> to;
  store(to.at[0], x, random16);
  write(static_cast<T*>(stream) + i, to);
}

__device__ inline void store_as(Kind kind, void* stream, int64_t i, float x, uint32_t random16) {
  if (kind == Kind::float32) return store_one<float>(stream, i, x, random16);
  if (kind == Kind::bfloat16) return store_one<BFloat16>(stream, i, x, random16);
  store_one<Float16>(stream, i, x, random16);
}

// ---- one group --------------------------------------------------------------------------------------------------

// Of a warp: local index of the lane's weight, number of its group, and whether the row goes on so far.
struct Lane {
  int64_t weight, group;
  int lane;
  bool there;
};

__device__ inline float load_lane(Kind kind, const void* stream, const Lane& at) {
  if (kind < Kind::code8) return at.there ? load_as(kind, stream, at.weight) : 0.0f;
  const uint8_t* bytes = static_cast<const uint8_t*>(stream) + at.group * kGroupBytes;
  const uint32_t low = read<1>(bytes + kGroup).at[0], high = read<1>(bytes + kGroup + 1).at[0];
  const float scale = float_of_bf16(static_cast<uint16_t>(low | high << 8));
  const uint8_t code = at.there ? read<1>(bytes + at.lane).at[0] : 0;
  return kind == Kind::code8 ? float_of_code(code, scale) : float_of_signed_code(static_cast<int8_t>(code), scale);
}

// All lanes of the warp. `part` of a level is added before its fraction is cut off.
__device__ inline void store_code(bool has_sign, void* stream, const Lane& at, float x, float part) {
  uint8_t* bytes = static_cast<uint8_t*>(stream) + at.group * kGroupBytes;
  const uint32_t bits = bits_of(x);
  const bool odd = (bits & 0x7fffffffu) >= 0x7f800000u || (!has_sign && bits > 0x80000000u);
  const float magnitude = odd || !at.there ? 0.0f : has_sign ? abs_of(x) : __fsqrt_rn(abs_of(x));
  // Of numbers that are not negative the bits have their order.
  const uint16_t stored = bf16_above(float_of(__reduce_max_sync(~0u, bits_of(magnitude))));
  const float scale = float_of_bf16(stored);
  const int code = has_sign ? signed_code_of(x, magnitude, scale, part) : code_of(x, magnitude, scale, part);
  const int kept = odd ? (has_sign ? kSignedNanCode : kNanCode) : code;
  // Every lane has read the old scale.
  __syncwarp();
  if (at.there) write(bytes + at.lane, Pack<uint8_t, 1>{static_cast<uint8_t>(kept)});
  if (at.lane < 2) write(bytes + kGroup + at.lane, Pack<uint8_t, 1>{static_cast<uint8_t>(stored >> 8 * at.lane)});
}

__device__ inline float part_of(uint32_t random16) { return static_cast<float>(random16 & 0xffffu) * 0x1p-16f; }

// ---- a chunk's groups -------------------------------------------------------------------------------------------

template <typename Step>
class CodedUpdate {
 public:
  __device__ CodedUpdate(const UpdateArguments& a, const Stored& stored, const Chunk& chunk)
      : a_(a),
        stored_(stored),
        place_(a.work.places[chunk.tensor]),
        tensor_(chunk.tensor),
        row_(reinterpret_cast<const typename Step::Row*>(a.hyper)[chunk.tensor]),
        key_{static_cast<uint32_t>(a.rng[0]), static_cast<uint32_t>(a.rng[1])},
        first_(global_index(place_, 0)),
        one_run_(run_length(place_, 0) >= numel_of(place_)) {}

  // The groups that begin in the chunk.
  __device__ void run(const Chunk& chunk, int warp, int warps, int lane) const {
    const int64_t columns = place_.columns, of_row = groups_of(columns);
    const int64_t end = groups_before(columns, chunk.offset + weights_of(place_, chunk));
    int64_t group = groups_before(columns, chunk.offset) + warp;
    int64_t row = group / of_row, of = group % of_row;
    for (; group < end; group += warps) {
      const int64_t column = of * kGroup + lane;
      at({row * columns + column, group, lane, column < columns});
      for (of += warps; of >= of_row; of -= of_row) ++row;
    }
  }

 private:
  using L = Lists<Step>;

  __device__ bool has(int list) const { return a_.lists >> list & 1; }
  __device__ void* stream(int list) const { return a_.work.stream<void>(list, tensor_); }

  __device__ void at(const Lane& lane) const {
    const float p = load_lane(stored_.params, stream(L::params), lane);
    float g[1] = {load_lane(stored_.params, stream(L::grads), lane)};
    if (a_.grad_scale != nullptr) g[0] = g[0] / a_.grad_scale[0];
    if (a_.clip != nullptr) g[0] = g[0] * a_.clip[0];
    float moments[Step::kMoments] = {};
    for (int m = 0; m < Step::kMoments; ++m) {
      if (has(L::moments + m)) moments[m] = load_lane(stored_.moments[m], stream(L::moments + m), lane);
    }
    const float shadow[1] = {has(L::shadow) ? load_lane(stored_.params, stream(L::shadow), lane) : p};
    float ipt[1] = {has(L::ipt) ? load_lane(stored_.ipt, stream(L::ipt), lane) : 0.0f};
    bool pruned = false;
    if (has(L::masks) && lane.there) {
      pruned = !(mask_bits<1>(static_cast<const uint8_t*>(stream(L::masks)), lane.weight) & 1);
    }

    const float next[1] = {Step::next(p, g[0], moments, row_)};
    const uint64_t index = lane.there ? index_of(lane.weight) : 0;
    const uint32_t random = random_bits(index, key_[0], key_[1]), of_moments = random_bits(index, key_[1], key_[0]);
    if (has(L::ipt)) {
      accumulate(a_.criterion, ipt, shadow, next, g, row_.lr, a_.accepted[0]);
      if (stored_.ipt == Kind::code8) {
        store_code(false, stream(L::ipt), lane, ipt[0], 0.5f);
      } else if (lane.there) {
        store_as(stored_.ipt, stream(L::ipt), lane.weight, ipt[0], random);
      }
    }
    for (int m = 0; m < Step::kMoments; ++m) {
      if (!has(L::moments + m)) continue;
      const float moment = pruned && a_.clear_state ? 0.0f : moments[m];
      const uint32_t bits = of_moments >> 16 * m;
      const Kind kind = stored_.moments[m];
      if (kind >= Kind::code8) {
        store_code(kind == Kind::signed8, stream(L::moments + m), lane, moment, part_of(bits));
      } else if (lane.there) {
        store_as(kind, stream(L::moments + m), lane.weight, moment, bits);
      }
    }
    if (!lane.there) return;
    if (has(L::shadow)) store_as(stored_.params, stream(L::shadow), lane.weight, next[0], random >> 16);
    store_as(stored_.params, stream(L::params), lane.weight, pruned ? 0.0f : next[0], random >> 16);
  }

  __device__ uint64_t index_of(int64_t weight) const {
    return static_cast<uint64_t>(one_run_ ? first_ + weight : global_index(place_, weight));
  }

  const UpdateArguments& a_;
  const Stored& stored_;
  const Place& place_;
  int64_t tensor_;
  typename Step::Row row_;
  uint32_t key_[2];
  int64_t first_;  // global index of the tensor's first weight
  bool one_run_;   // global indices are consecutive within the tensor
};
