"""A loaded model's modules, replaced on CPUs by faster ones that compute the same.

linear          linear layers with packed weights, for every family
shape           which decoder layers are of the Llama shape
decoder_layer   such a layer in float32, as one kernel
onednn_layer    such a layer in bfloat16, as a few calls
replace         swaps them in, layer by layer, once the first has proved equal
"""
