"""The definition of sampling, in modules named like those of headway's own."""
