"""Counting the instructions of loops, on machine code that is written here."""

from r1kernels.triton import sass

LISTING = """
	.section	.text.first_kernel,"ax",@progbits
.text.first_kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @P0  BRA `(.L_x_2) ;
        /*0030*/                   FSEL R4, R4, R5, !P1 ;
        /*0040*/                   FSEL R4, R4, R5, !P2 ;
.L_x_2:
        /*0050*/              @P1  BRA `(.L_x_4) ;
        /*0060*/                   MUFU.EX2 R8, R4 ;
        /*0070*/                   MUFU.EX2 R9, R5 ;
        /*0080*/                   BRA `(.L_x_3) ;
.L_x_4:
        /*0090*/                   MUFU.RCP R9, R5 ;
.L_x_3:
        /*00a0*/              @!P4 BRA `(.L_x_1) ;
        /*00b0*/                   EXIT ;
.L_x_5:
        /*00c0*/                   BRA `(.L_x_5);
	.section	.text.second_kernel,"ax",@progbits
        /*0000*/                   EXIT ;
"""


def test_the_shortest_way_round_with_an_exponential_for_each_entry() -> None:
    kernels = sass.kernels_of(LISTING)
    assert list(kernels) == ["first_kernel", "second_kernel"] and len(kernels["first_kernel"]) == 13
    (loop,) = sass.loops(kernels["first_kernel"], 2)
    # LDG, BRA over the rare case, BRA not taken, two MUFU, BRA, BRA backwards; MUFU.RCP alone would be shorter.
    assert (loop.begin, loop.end, loop.instructions, loop.of_an_entry) == (1, 10, 7, 3.5)
    (loop,) = sass.loops(kernels["first_kernel"], 1)
    assert loop.instructions == 7
    assert not sass.loops(kernels["first_kernel"], 3)
    assert not sass.loops(kernels["second_kernel"], 1)


def test_an_outer_loop_is_not_counted() -> None:
    code = LISTING.replace("EXIT ;\n.L_x_5", "@!P5 BRA `(.L_x_1) ;\n.L_x_5")
    assert len(sass.loops(sass.kernels_of(code)["first_kernel"], 2)) == 1


def test_a_program_that_is_nowhere_is_not_found() -> None:
    assert sass.tool("no such program") is None
