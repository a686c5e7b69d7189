"""The kernel back ends: each a module with the same primitives."""
