# SPDX-License-Identifier: MIT
# read_cuda_archs(<list> <archs> <gencode>): compute capabilities as in TORCH_CUDA_ARCH_LIST ("7.5 8.0 8.6 9.0+PTX",
# "Ampere;Hopper", "All") -> those of 8.0 and newer, and nvcc's options for them; both empty if there are none.
#   cmake -DARCHS="7.5 8.0" -P cmake/cuda_archs.cmake    prints both
cmake_minimum_required(VERSION 3.25)

# As torch.utils.cpp_extension has the names
set(DF_ARCH_NAMES
  "Kepler=3.5+PTX" "Kepler+Tesla=3.7" "Maxwell=5.0 5.2+PTX" "Maxwell+Tegra=5.3" "Pascal=6.0 6.1+PTX" "Volta=7.0+PTX"
  "Volta+Tegra=7.2" "Turing=7.5+PTX" "Ampere=8.0 8.6+PTX" "Ampere+Tegra=8.7" "Ada=8.9+PTX" "Hopper=9.0+PTX"
  "Blackwell=10.0 10.3 12.0 12.1+PTX" "Blackwell+Tegra=11.0"
  # machine code for A100 and what is like it, for H100, and PTX for all that is newer
  "All=8.0 9.0+PTX" "Common=8.0 9.0+PTX")

function(read_cuda_archs list archs_out gencode_out)
  string(REGEX REPLACE "[ ,]+" ";" list "${list}")
  set(entries "")
  foreach(entry IN LISTS list)
    foreach(name IN LISTS DF_ARCH_NAMES)
      string(REPLACE "=" ";" name "${name}")
      list(GET name 1 meaning)
      list(GET name 0 name)
      if(entry STREQUAL name)
        string(REPLACE " " ";" entry "${meaning}")
        break()
      endif()
    endforeach()
    list(APPEND entries ${entry})
  endforeach()
  list(REMOVE_DUPLICATES entries)
  set(archs "")
  set(gencode "")
  set(dropped "")
  foreach(entry IN LISTS entries)
    if(NOT entry MATCHES "^([0-9]+)\\.([0-9])([af]?)(\\+PTX)?$")
      message(FATAL_ERROR
        "dalle_fast: cannot read the CUDA architecture '${entry}' (expected e.g. 8.0, 9.0+PTX, 12.0a, Ampere or All)")
    endif()
    set(sm "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3}")
    if(CMAKE_MATCH_1 LESS 8)
      list(APPEND dropped "${entry}")
      continue()
    endif()
    list(APPEND archs "${entry}")
    if(CMAKE_MATCH_4)
      list(APPEND gencode "-gencode=arch=compute_${sm},code=[sm_${sm},compute_${sm}]")
    else()
      list(APPEND gencode "-gencode=arch=compute_${sm},code=sm_${sm}")
    endif()
  endforeach()
  if(dropped)
    string(REPLACE ";" " " dropped "${dropped}")
    message(STATUS "dalle_fast: no kernels for ${dropped}: they need compute capability 8.0 (bfloat16, cp.async)")
  endif()
  set(${archs_out} "${archs}" PARENT_SCOPE)
  set(${gencode_out} "${gencode}" PARENT_SCOPE)
endfunction()

if(CMAKE_SCRIPT_MODE_FILE STREQUAL CMAKE_CURRENT_LIST_FILE)
  read_cuda_archs("${ARCHS}" archs gencode)
  message(STATUS "archs=${archs}")
  message(STATUS "gencode=${gencode}")
endif()
