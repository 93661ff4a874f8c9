"""Mistakes that a type checker finds before the program runs: one in each line that says so, and no other."""

import numpy as np

import headway as hw
import headway.lm

x = np.ones((1, 2, 4))
cache = hw.KVCache(1, 4)
sampler = hw.Sampler(4)
model = headway.lm.load()

hw.attention(x, x, x, causal="botom_right")  # mistake
hw.attention(x, x, x, precision="fsat")  # mistake
hw.attention(x, x, x, casual=True)  # mistake
hw.attention(x, x, x, window=3)  # mistake
hw.attention(x, x, x, return_lse="yes")  # mistake
hw.attention(x, x)  # mistake
hw.attention(x, x, x, x)  # mistake
hw.attention({"q": 1}, x, x)  # mistake
hw.attention_weights(x, x, precision="fast")  # mistake
hw.attention_weights(x, x, causal="botom_right")  # mistake
hw.partial_attention(x, x, x, sinks=[0.0])  # mistake
hw.partial_attention(x, x, x, causal="botom_right")  # mistake
hw.multi_head_attention(x, x, x)  # mistake
hw.multi_head_attention(x, x, x, num_heads=2, precision="fsat")  # mistake
hw.multi_head_attention(x, x, x, num_heads=2, w_p=x)  # mistake
cache.attend(x, causal="botom_right")  # mistake
cache.attend(x, key_offset=512)  # mistake
hw.sample(x, topk=3)  # mistake
hw.sample(x, dialect="vlm")  # mistake
hw.sample(x, repetition=1.3)  # mistake
hw.probabilities(x, ties="highest")  # mistake
hw.SamplingParams(nucleus="first")  # mistake
hw.penalize(x, [1], repetition_penalty=1.3)  # mistake
hw.penalize(x, [1], unknown_tokens="skip")  # mistake
sampler.admit(frequency_penalty=0.5)  # mistake
model.generate("In", max_token=3)  # mistake
model.generate("In", dialect="vlm")  # mistake
