"""Names that differ between triton 3.6 and later releases. Delete each branch with the last release that needs it."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

if hasattr(tma, "async_load"):
    async_load = tma.async_load
    async_store = tma.async_store
else:
    async_load = tma.async_copy_global_to_shared
    async_store = tma.async_copy_shared_to_global

thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

if hasattr(gluon, "aggregate"):
    aggregate = gluon.aggregate
else:
    from triton.language.core import _aggregate

    def aggregate(cls):
        """Triton's aggregate, built by keyword only: 3.6 does not hash the order of fields into a cache key."""

        def init(self, **fields):
            for name, value in fields.items():
                setattr(self, name, value)

        init.__triton_builtin__ = True  # else 3.6 tries to hash it as a JIT function
        cls.__init__ = init
        return _aggregate(cls)
