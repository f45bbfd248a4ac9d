// poison_memory: for tests, what the library allocates holds NaN until a kernel writes it (include/tensor.h).
#include "tensor.h"

namespace pyarch {
namespace {

void set_poison_memory(bool on) { poison_memory.store(on); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyarch, CompositeExplicitAutograd, m) {
  m.impl("poison_memory", TORCH_BOX(&set_poison_memory));
}

}  // namespace pyarch
