"""Floor 2: evidence, who verified it, what a policy says to it, and the result that others may rely on.

The verifiers establish authenticity only; the appraisal compares with the policy; the result is the only thing
that leaves. docs/spec/evidence.md has every byte.
"""
