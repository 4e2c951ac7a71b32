// The loops for any CPU of this architecture.
#include "kernels.h"

namespace pins_ext::cpu {
namespace {
#include "isa.inl"
}  // namespace

const Kernels default_kernels = table("default");

}  // namespace pins_ext::cpu
