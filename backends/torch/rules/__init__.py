"""One function for each kind of autograd node: what the layer's input is, and how to arrange the gradient at the output."""

from . import convolution as _convolution
from . import elementwise as _elementwise
from . import lookup as _lookup
from . import matrix as _matrix
from . import normalisation as _normalisation
from ._registry import Place as Place
from ._registry import Site as Site
from ._registry import site_of as site_of

__all__ = ["Place", "Site", "site_of"]
del _convolution, _elementwise, _lookup, _matrix, _normalisation  # imported for their registrations
