# SPDX-License-Identifier: Apache-2.0
# torch_stable: headers and libraries of the installed torch (torch_dir), for the stable ABI only.
# find_package(Torch) would demand a CUDA toolkit that matches torch's; a stable-ABI library needs
# neither that nor C++ ABI flags.
if(NOT EXISTS "${torch_dir}/include/torch/csrc/stable/ops.h")
  message(FATAL_ERROR "seer_cuda: torch >= 2.11 was not found for ${Python_EXECUTABLE} "
                      "(looked in '${torch_dir}'). Install torch first, then build with "
                      "pip install --no-build-isolation, or configure with -DSEER_TORCH=OFF.")
endif()
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${torch_dir}/include")
# 2.11: the oldest torch that the built library loads on, whatever torch it was built against.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
# libtorch.so is a stub that needs libtorch_cuda where there is one. It must stay in NEEDED: the
# weak stream symbol would otherwise resolve to null on a CUDA torch too.
target_link_directories(torch_stable INTERFACE "${torch_dir}/lib")
target_link_options(torch_stable INTERFACE -Wl,--no-as-needed -Wl,--exclude-libs,ALL)
target_link_libraries(torch_stable INTERFACE torch torch_cpu c10)
