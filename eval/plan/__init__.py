"""Planning: what a model, a policy and a chip come to before any weight is loaded, and what a TPU compiler says of it.

The model of cost is that of "Challenges in Deploying Long-Context Transformers: A Theoretical Peak Performance
Analysis" (2024): memory decides how many caches fit, arithmetic how long a prompt takes, bandwidth how long a token
takes, and the link to the host how long it takes to exchange one cache for another.
"""
