"""One registered function for each operator, by family; importing the package registers all."""

from mgs_core.onnx.operators import activations as activations
from mgs_core.onnx.operators import arithmetic as arithmetic
from mgs_core.onnx.operators import attention as attention
from mgs_core.onnx.operators import creation as creation
from mgs_core.onnx.operators import indexing as indexing
from mgs_core.onnx.operators import learn as learn
from mgs_core.onnx.operators import linear as linear
from mgs_core.onnx.operators import normalization as normalization
from mgs_core.onnx.operators import recurrent as recurrent
from mgs_core.onnx.operators import reductions as reductions
from mgs_core.onnx.operators import resize as resize
from mgs_core.onnx.operators import sampling as sampling
from mgs_core.onnx.operators import sequences as sequences
from mgs_core.onnx.operators import shapes as shapes
from mgs_core.onnx.operators import signal as signal
from mgs_core.onnx.operators import states as states
from mgs_core.onnx.operators import windows as windows
