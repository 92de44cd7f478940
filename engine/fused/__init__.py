"""A loaded model's modules, replaced by faster ones that compute the same.

shape           which decoder layers are of the Llama shape
replace         swaps stand-ins in, layer by layer, once the first of each kind has proved equal
kit             what a device has of them, by attention backend

cpu_kit         for CPUs:
linear          linear layers with packed weights, for every family
decoder_layer   a layer of the Llama shape in float32, as one kernel
onednn_layer    such a layer in bfloat16, as a few calls

gpu_kit         for GPUs:
gpu_linear      linear layers side by side, or such whose rows do not depend on each other
gpu_norm        RMS norms, for every family
gpu_mlp         gated MLPs, for those that have such
gpu_layer       a layer of the Llama shape, as a few launches
"""
