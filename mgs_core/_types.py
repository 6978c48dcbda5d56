"""Array and namespace types, and the letters used everywhere.

n samples, m other samples, c outputs (classes), k heads (scalars per sample), p parameters, s positions at which one weight
is used for one sample, g groups (of a grouped convolution), i layer inputs, o layer outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

__all__ = ["Array", "Float", "LossFunction", "Namespace", "Shaped", "Tree"]

#: An array of any framework. Frameworks share no base class, so the static type is `Any`; shapes are checked at run time.
Array: TypeAlias = Any
#: A module-like object with the functions of the array-API standard.
Namespace: TypeAlias = Any
#: Any nesting of dicts, lists and tuples with arrays as leaves.
Tree: TypeAlias = Any
#: `(outputs (n, c), targets) → (n,)`.
LossFunction: TypeAlias = Callable[[Array, Array], Array]

if TYPE_CHECKING:  # to a type checker, which need not know jaxtyping, a shape is a remark
    from typing import Annotated as Float
    from typing import Annotated as Shaped
else:
    try:  # shapes in annotations are checked in the tests only, so jaxtyping is no dependency
        from jaxtyping import Float as Float
        from jaxtyping import Shaped as Shaped
    except ImportError:

        class _Unchecked:
            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Float = Shaped = _Unchecked
