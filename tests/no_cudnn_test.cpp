// What the CUDA backend says of cuDNN where it was built without it.
#include <gtest/gtest.h>

#include "cuda/cudnn_sdpa.h"
#include "tests/error_of.h"

namespace weft::cuda {
namespace {

TEST(NoCudnn, SaysWhyThereIsNoneAndMakesNoPlan) {
  EXPECT_NE(why_no_cudnn().find("headers"), std::string::npos) << why_no_cudnn();
  EXPECT_NE(describe_cudnn().find("the build saw "), std::string::npos) << describe_cudnn();
  EXPECT_NE(describe_cudnn().find("attention is our own"), std::string::npos) << describe_cudnn();
  EXPECT_ERROR(ErrorKind::kDevice, "this build has no attention of cuDNN", sdpa_proposals({}, "{}", 90));
}

}  // namespace
}  // namespace weft::cuda
