#include "tests/op_cases.h"

#include <iterator>

namespace weft::testing {

std::vector<OpCase> all_op_cases() {
  std::vector<OpCase> all;
  for (const auto family :
       {elementwise_cases, reduction_cases, matmul_cases, norm_cases, attention_cases, loss_cases, index_cases}) {
    std::vector<OpCase> cases = family();
    all.insert(all.end(), std::make_move_iterator(cases.begin()), std::make_move_iterator(cases.end()));
  }
  return all;
}

}  // namespace weft::testing
