# The CUDA kernels by the PTX that nvcc makes of them, in C++ (tools/ptx_to_cpp.py, ptx_on_cpu.h): sets TRANSLATIONS,
# and CUDA_KERNELS to copies in which the kernels have names that are the same to both compilers, and exported.
find_program(NVCC nvcc HINTS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin REQUIRED)
find_package(Python REQUIRED COMPONENTS Interpreter)
file(GLOB HEADERS CONFIGURE_DEPENDS csrc/kernels/*.h csrc/kernels/cuda/*.h)
set(TO_CPP ${CMAKE_SOURCE_DIR}/tools/ptx_to_cpp.py)
set(COPIES)
foreach(kernel ${CUDA_KERNELS})
  get_filename_component(name ${kernel} NAME_WE)
  file(READ ${kernel} SOURCE)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${kernel})
  string(REPLACE "\nnamespace {" "\ninline namespace ${name}_file {" SOURCE "${SOURCE}")
  set(copy ${CMAKE_BINARY_DIR}/ptx/${name})
  file(CONFIGURE OUTPUT ${copy}.cu CONTENT "${SOURCE}" @ONLY)  # written where it differs
  list(APPEND COPIES ${copy}.cu)
  set(last 0)  # so many files, less one, for compilers that run side by side
  set(choice)
  if(name MATCHES persistent)
    set(last 7)
    set(choice ${ULMFIT_FAST_PTX_PERSISTENT})
  endif()
  set(parts)
  foreach(part RANGE ${last})
    list(APPEND parts ${copy}.${part}.cpp)
  endforeach()
  list(LENGTH parts count)
  add_custom_command(
    OUTPUT ${parts}
    COMMAND ${NVCC} -std=c++20 -O3 -ptx -arch=compute_${ULMFIT_FAST_PTX_ON_CPU} -I ${CMAKE_SOURCE_DIR}/csrc/kernels/cuda
            ${copy}.cu -o ${copy}.ptx
    COMMAND ${Python_EXECUTABLE} ${TO_CPP} ${copy}.ptx ${copy} ${count} ${choice}
    DEPENDS ${copy}.cu ${HEADERS} ${TO_CPP}
    VERBATIM)
  list(APPEND TRANSLATIONS ${parts})
endforeach()
set(CUDA_KERNELS ${COPIES})
set_source_files_properties(${CUDA_KERNELS} PROPERTIES COMPILE_OPTIONS "-fvisibility=default;-I;${CMAKE_SOURCE_DIR}/csrc/kernels/cuda")
# thousands of registers each: -O3 takes long
set_source_files_properties(${TRANSLATIONS} PROPERTIES COMPILE_OPTIONS "-O1;-Wno-unused")
add_compile_definitions(ULMFIT_PTX_ON_CPU=${ULMFIT_FAST_PTX_ON_CPU})
