// A job of an update operator as tests/helpers/cuda_job.py packs it: what the programs read that run the CUDA kernels'
// source on the CPU. Included inside their namespace.

bool receive(void* to, size_t bytes) { return bytes == 0 || std::fread(to, bytes, 1, stdin) == 1; }

template <typename T>
std::vector<T> receive_array(int64_t count) {
  std::vector<T> values(count);
  if (!receive(values.data(), count * sizeof(T))) std::abort();
  return values;
}

// Bytes that start `misalignment` after a multiple of 64 and end with their allocation.
struct Operand {
  void* allocation = nullptr;
  char* data;
  int64_t bytes;

  Operand(int64_t misalignment, int64_t size) : bytes(size) {
    if (posix_memalign(&allocation, 64, misalignment + size) != 0) std::abort();
    data = static_cast<char*>(allocation) + misalignment;
  }
};

// Job header, all int64.
struct Job {
  int64_t step;     // 0 AdamW, 1 SGD, 2 mask alone
  int64_t dtype;    // of the parameters: 0 float32, 1 bfloat16, 2 float16
  int64_t state;    // of ipt: 0 float32, 1 bfloat16
  int64_t moments;  // as dtype
  int64_t criterion;
  int64_t clear_state;
  int64_t lists;  // how many
  int64_t given;  // bit k: list k is given
  int64_t tensors;
  int64_t chunks;
  int64_t threads;
  int64_t scalars;  // bit 0 grad_scale, 1 clip, 2 found_inf
};

// The tables, scalars and operands of a job, and the arguments that point to them.
struct Received {
  Job job;
  std::vector<Place> places;
  std::vector<Chunk> chunks;
  std::vector<float> hyper, scalars;  // scalars: accepted, grad_scale, clip, found_inf
  std::vector<int64_t> rng, pointers;
  std::vector<Operand> operands;

  explicit Received(const Job& header)
      : job(header),
        places(receive_array<Place>(job.tensors)),
        chunks(receive_array<Chunk>(job.chunks)),
        hyper(receive_array<float>(8 * job.tensors)) {
    rng = receive_array<int64_t>(2);
    scalars = receive_array<float>(4);
    for (int64_t i = 0; i < job.lists * job.tensors; ++i) {
      const auto shape = receive_array<int64_t>(2);
      operands.emplace_back(shape[0], shape[1]);
      if (!receive(operands.back().data, shape[1])) std::abort();
      pointers.push_back(reinterpret_cast<int64_t>(operands.back().data));
    }
  }

  UpdateArguments arguments() const {
    const auto scalar = [&](int k) { return job.scalars >> k & 1 ? &scalars[k + 1] : nullptr; };
    return {{pointers.data(), job.tensors, places.data(), chunks.data()},
            hyper.data(),
            scalars.data(),
            rng.data(),
            scalar(0),
            scalar(1),
            scalar(2),
            static_cast<uint32_t>(job.given),
            static_cast<Criterion>(job.criterion),
            job.clear_state != 0};
  }

  void answer(int64_t accesses) const {
    std::fwrite(&accesses, sizeof accesses, 1, stdout);
    for (const Operand& operand : operands) {
      std::fwrite(operand.data, 1, operand.bytes, stdout);
      std::free(operand.allocation);
    }
  }
};
