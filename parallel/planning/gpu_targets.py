"""GPUs as XLA's compiler is told of them: the text form of its GpuTargetConfigProto.

With it a program is compiled for a GPU that is not there (`parallel.planning.compilers`). The
figures are the vendor's: cores, memory, clocks, as a driver reports them.
"""

_TEXT = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared_optin}
  shared_memory_per_core: {shared} core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock}
  device_memory_size: {memory} cuda_compute_capability {{ {capability} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }} device_description_str: "{name}"
"""

_HOPPER = {
    "capability": "major: 9 feature_extension: ACCELERATED_FEATURES",
    "cores": 132,
    "fpus": 128,
    "shared": 233472,
    "shared_optin": 232448,
    "l2": 52428800,
    "clock": 1.98,
}
_GPUS = {
    "h100": {
        "name": "NVIDIA H100 80GB HBM3",
        "memory": 84942979072,
        "bandwidth": 3352320000000,
        **_HOPPER,
    },
    "h200": {
        "name": "NVIDIA H200 141GB HBM3e",
        "memory": 151397597184,
        "bandwidth": 4800000000000,
        **_HOPPER,
    },
    "a100": {
        "name": "NVIDIA A100-SXM4-80GB",
        "memory": 85100068864,
        "bandwidth": 2039040000000,
        "capability": "major: 8",
        "cores": 108,
        "fpus": 64,
        "shared": 167936,
        "shared_optin": 166912,
        "l2": 41943040,
        "clock": 1.41,
    },
}

TARGET_TEXTS = {name: _TEXT.format(**values) for name, values in _GPUS.items()}
"""The target of every GPU of `parallel.planning.accelerators`, by its name there."""

MEMORY_BYTES = {name: values["memory"] for name, values in _GPUS.items()}
"""Memory of one device, as the driver reports it."""
