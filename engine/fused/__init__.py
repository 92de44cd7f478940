"""A loaded model's modules, replaced on CPUs by faster ones that compute the same.

linear          linear layers with packed weights, for every family
decoder_layer   whole decoder layers of the Llama shape
replace         swaps them in, layer by layer, once the first has proved equal
"""
