// eligible_: of every group N:M the N best by (key, position), among rows of keys: a lane is a group, a row a position.

// A group has at most this many weights; pins_ext/patterns.py MOST.
constexpr int64_t kMostOfGroup = 32;

struct alignas(64) GroupRows {
  uint32_t keys[kMostOfGroup * kWord];    // kWord groups; row j begins at j * kWord
  uint32_t beaten[kMostOfGroup * kWord];  // how many of its group a weight lies above
};

// Every weight against every later one of its group: of equal keys the later one is the better.
template <int64_t of>
inline __attribute__((always_inline)) void compare_rows(GroupRows& rows, int64_t lanes) {
  for (int64_t lane = 0; lane < lanes; ++lane) {
    uint32_t keys[of], beaten[of] = {};
#pragma GCC unroll 8
    for (int64_t j = 0; j < of; ++j) keys[j] = rows.keys[j * kWord + lane];
#pragma GCC unroll 8
    for (int64_t j = 1; j < of; ++j) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < j; ++i) {
        const uint32_t later = keys[i] <= keys[j] ? 1 : 0;
        beaten[j] += later;
        beaten[i] += 1 - later;
      }
    }
#pragma GCC unroll 8
    for (int64_t j = 0; j < of; ++j) rows.beaten[j * kWord + lane] = beaten[j];
  }
}

PINS_BLOCK void compare_four(GroupRows& rows, int64_t lanes) { compare_rows<4>(rows, lanes); }
PINS_BLOCK void compare_eight(GroupRows& rows, int64_t lanes) { compare_rows<8>(rows, lanes); }

PINS_BLOCK void compare_any(GroupRows& rows, int64_t of, int64_t lanes) {
  for (int64_t i = 0; i < of * kWord; ++i) rows.beaten[i] = 0;
  for (int64_t j = 1; j < of; ++j) {
    for (int64_t i = 0; i < j; ++i) {
      const uint32_t* __restrict first = rows.keys + i * kWord;
      const uint32_t* __restrict second = rows.keys + j * kWord;
      uint32_t* __restrict of_first = rows.beaten + i * kWord;
      uint32_t* __restrict of_second = rows.beaten + j * kWord;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const uint32_t later = first[lane] <= second[lane] ? 1 : 0;
        of_second[lane] += later;
        of_first[lane] += 1 - later;
      }
    }
  }
}

inline void compare(GroupRows& rows, int64_t of, int64_t lanes) {
  if (of == 4) return compare_four(rows, lanes);
  if (of == 8) return compare_eight(rows, lanes);
  compare_any(rows, of, lanes);
}

// Weights that lie side by side into rows, and the other way round.
template <int64_t fixed>
inline __attribute__((always_inline)) void to_rows(const uint32_t* __restrict keys, int64_t of, int64_t lanes,
                                                   uint32_t* __restrict rows) {
  const int64_t m = fixed > 0 ? fixed : of;
  for (int64_t lane = 0; lane < lanes; ++lane) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < m; ++j) rows[j * kWord + lane] = keys[lane * m + j];
  }
}

template <int64_t fixed>
inline __attribute__((always_inline)) void from_rows(const uint32_t* __restrict rows, int64_t of, int64_t lanes,
                                                     uint32_t* __restrict side_by_side) {
  const int64_t m = fixed > 0 ? fixed : of;
  for (int64_t lane = 0; lane < lanes; ++lane) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < m; ++j) side_by_side[lane * m + j] = rows[j * kWord + lane];
  }
}

PINS_BLOCK void rank_side_by_side(const uint32_t* keys, int64_t of, int64_t lanes, GroupRows& rows, uint32_t* beaten) {
  if (of == 4) {
    to_rows<4>(keys, of, lanes, rows.keys);
    compare_four(rows, lanes);
    from_rows<4>(rows.beaten, of, lanes, beaten);
  } else if (of == 8) {
    to_rows<8>(keys, of, lanes, rows.keys);
    compare_eight(rows, lanes);
    from_rows<8>(rows.beaten, of, lanes, beaten);
  } else {
    to_rows<0>(keys, of, lanes, rows.keys);
    compare_any(rows, of, lanes);
    from_rows<0>(rows.beaten, of, lanes, beaten);
  }
}

template <Score score>
void scores_block(const float* __restrict a, const float* __restrict b, float factor, int64_t n,
                  float* __restrict target) {
  for (int64_t i = 0; i < n; ++i) target[i] = score_of<score>(a[i], b[i], factor);
}

PINS_BLOCK void keys_of_scores(const float* __restrict scores, int64_t n, uint32_t* __restrict keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = order_key(scores[i]);
}

// In place; returns how many scores are NaN.
PINS_BLOCK int64_t mark_best(float* __restrict scores, const uint32_t* __restrict beaten, uint32_t least, int64_t n) {
  uint32_t nans = 0;
  for (int64_t i = 0; i < n; ++i) {
    nans += scores[i] != scores[i] ? 1 : 0;
    scores[i] = eligible_score(scores[i], beaten[i] >= least);
  }
  return nans;
}

// The groups whose first weight lies in the run; returns how many of their scores are NaN.
template <Score score>
int64_t eligible(const Eligible& args) {
  const Run& run = args.run;
  const int64_t of = args.of, stride = args.stride, end = run.offset + run.count;
  const uint32_t least = static_cast<uint32_t>(of - args.keep);
  Buffer a_buffer, b_buffer;
  GroupRows rows;
  int64_t nans = 0;
  const auto written = [&](int64_t at, int64_t n) {
    const float* a = load(args.a, at, n, a_buffer);
    const float* b = args.b.data ? load(args.b, at, n, b_buffer) : a;
    scores_block<score>(a, b, args.factor, n, args.scores + at);
    return args.scores + at;
  };
  if (stride == 1) {
    const int64_t most = (kBlock / of < kWord ? kBlock / of : kWord) * of;
    Bits keys, beaten;
    for (int64_t at = (run.offset + of - 1) / of * of; at < end; at += most) {
      const int64_t groups = (end - at + of - 1) / of, n = groups * of < most ? groups * of : most;
      float* scores = written(at, n);
      keys_of_scores(scores, n, keys.values);
      rank_side_by_side(keys.values, of, n / of, rows, beaten.values);
      nans += mark_best(scores, beaten.values, least, n);
    }
    return nans;
  }
  for (int64_t at = run.offset; at < end;) {
    const int64_t row = at / stride, row_end = (row + 1) * stride;
    if (row % of != 0) {
      at = (row - row % of + of) * stride;
      continue;
    }
    int64_t lanes = (row_end < end ? row_end : end) - at;
    lanes = lanes < kWord ? lanes : kWord;
    for (int64_t j = 0; j < of; ++j) keys_of_scores(written(at + j * stride, lanes), lanes, rows.keys + j * kWord);
    compare(rows, of, lanes);
    for (int64_t j = 0; j < of; ++j) {
      nans += mark_best(args.scores + at + j * stride, rows.beaten + j * kWord, least, lanes);
    }
    at += lanes;
  }
  return nans;
}
