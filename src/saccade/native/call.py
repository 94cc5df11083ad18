"""The C interface of the engine as ctypes sees it, field by field as in engine.h."""

from __future__ import annotations

import ctypes

from torch import Tensor


class Array(ctypes.Structure):
    """Numbers (batch, head, row, dim) by their strides; the last dimension is contiguous."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("row", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, x: Tensor) -> Array:
        """A view of x (b, h, n, d); the caller keeps x alive."""
        return cls(x.data_ptr(), *x.stride()[:3])


class Part(ctypes.Structure):
    """Which keys the rows of some slots read: intervals, or listed tiles."""

    _fields_ = [
        ("row_order", ctypes.c_void_p),
        ("key_order", ctypes.c_void_p),
        ("slots", ctypes.c_int64),
        ("lo", ctypes.c_void_p),
        ("hi", ctypes.c_void_p),
        ("intervals", ctypes.c_int64),
        ("per_batch", ctypes.c_int64),
        ("tile", ctypes.c_void_p),
        ("tiles", ctypes.c_int64),
        ("bits", ctypes.c_void_p),
    ]


class Call(ctypes.Structure):
    """One forward or backward pass."""

    _fields_ = [
        ("bf16", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("keys", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("q", Array),
        ("k", Array),
        ("v", Array),
        ("out", Array),
        ("grad", Array),
        ("dq", Array),
        ("dk", Array),
        ("dv", Array),
        ("lse", ctypes.c_void_p),
        ("delta", ctypes.c_void_p),
        ("dlse", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("isa", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("part", ctypes.POINTER(Part)),
        ("parts", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("valid", ctypes.c_void_p),
        ("choices", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("choice_rows", ctypes.c_int64),
        ("limit_lo", ctypes.c_void_p),
        ("limit_hi", ctypes.c_void_p),
        ("limit_per_batch", ctypes.c_int64),
        ("terms", Array),
        ("dterms", Array),
        ("slot", ctypes.c_void_p),
        ("slots", ctypes.c_int64),
        ("term_dim", ctypes.c_int64),
        ("pool", ctypes.c_void_p),
        ("computed", ctypes.c_int64),
    ]


class Choice(ctypes.Structure):
    """A choice to make: the best of the blocks below the bound of each row."""

    _fields_ = [
        ("vectors", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("choices", ctypes.c_int64),
        ("bound", ctypes.c_void_p),
        ("per_batch", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("valid", ctypes.c_void_p),
    ]


class Linear(ctypes.Structure):
    """One forward or backward pass over a state."""

    _fields_ = [
        ("bf16", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("q", Array),
        ("k", Array),
        ("v", Array),
        ("out", Array),
        ("grad", Array),
        ("dq", Array),
        ("dk", Array),
        ("dv", Array),
        ("log", Array),
        ("dlog", Array),
        ("gain", Array),
        ("dgain", Array),
        ("s", ctypes.c_void_p),
        ("z", ctypes.c_void_p),
        ("s_after", ctypes.c_void_p),
        ("z_after", ctypes.c_void_p),
        ("ds_after", ctypes.c_void_p),
        ("dz_after", ctypes.c_void_p),
        ("ds", ctypes.c_void_p),
        ("dz", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("dtotal", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("least", ctypes.c_float),
        ("elu", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("overwrites", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("decay_rule", ctypes.c_int32),
        ("gain_rule", ctypes.c_int32),
        ("log_heads", ctypes.c_int32),
        ("gain_heads", ctypes.c_int32),
        ("temperature", ctypes.c_float),
        ("most", ctypes.c_float),
        ("unit_eps", ctypes.c_float),
        ("norm_eps", ctypes.c_float),
        ("rate", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("pool", ctypes.c_void_p),
        ("computed", ctypes.c_int64),
    ]
