"""What plans are made of: shapes, devices, tables of measurements, and for each backend and op its config and rule.

| file | what |
|---|---|
| `shapes` | static facts of a call, and `LayerSpec` |
| `device` | figures of a GPU |
| `backend`, `backends` | plans, the record of a backend, and the table of all backends |
| `hopper_attention`, `hopper_matmul`, `hopper_layer`, `hopper` | backend "mosaic_gpu", by op, and what they share |
| `xla` | backend "xla" |
| `tables` | measured matmuls, which go before the rules |

`heuristics` is the face: it asks the tables, then the backends in order.
"""
