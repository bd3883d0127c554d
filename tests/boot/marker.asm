; A test disk's boot sector: says on COM1 what machine it was handed, then stands still.
;
; DISK_NAME is the character it calls itself by.

bits 16
cpu 686
org 0x7C00

        mov     [cs:regs], dx
        mov     [cs:regs + 2], sp
        mov     [cs:regs + 4], ss
        mov     [cs:regs + 6], ds
        mov     [cs:regs + 8], es
        pushf
        pop     word [cs:regs + 10]
        xor     ax, ax
        mov     ds, ax
        mov     ax, cs
        mov     [regs + 12], ax

        mov     si, txt_booted
        call    text
        mov     bx, [regs]
        call    hex
        mov     si, txt_stack
        call    text
        mov     bx, [regs + 4]
        call    hex
        mov     bx, [regs + 2]
        call    hex
        mov     si, txt_segments
        call    text
        mov     bx, [regs + 12]
        call    hex
        mov     bx, [regs + 6]
        call    hex
        mov     bx, [regs + 8]
        call    hex
        mov     si, txt_flags
        call    text
        mov     bx, [regs + 10]
        and     bx, 0x0200              ; interrupts on?
        call    hex
        mov     si, txt_mode
        call    text
        mov     ah, 0x0F
        int     0x10
        mov     ah, 0
        mov     bx, ax
        call    hex
        mov     si, txt_masks
        call    text
        in      al, 0xA1
        mov     ah, al
        in      al, 0x21
        mov     bx, ax
        call    hex
        mov     si, txt_motor
        call    text
        mov     dx, 0x3F2
        in      al, dx
        and     al, 0xF0
        mov     ah, [0x43F]
        and     ah, 0x0F
        mov     bx, ax
        call    hex
        mov     si, txt_vector
        call    text
        mov     bx, [0x60 * 4 + 2]
        call    hex
        mov     bx, [0x60 * 4]
        call    hex
        mov     si, txt_time
        call    text
        mov     bx, [0x46E]
        call    hex
        mov     bx, [0x46C]
        call    hex
        sti
        mov     ax, [0x46C]             ; the BIOS's clock must tick: this hangs otherwise
.tick:
        hlt
        cmp     ax, [0x46C]
        je      .tick
        mov     si, txt_ticks
        call    text
.stand:
        hlt
        jmp     .stand

text:
        lodsb
        test    al, al
        jz      .done
        call    char
        jmp     text
.done:
        ret

hex:                                    ; BX and a blank
        mov     cx, 4
.digit:
        rol     bx, 4
        mov     al, bl
        and     al, 15
        cmp     al, 10
        sbb     al, 0x69
        das
        call    char
        loop    .digit
        ret

char:
        mov     ah, al
        mov     dx, 0x3FD
.wait:
        in      al, dx
        test    al, 0x20
        jz      .wait
        mov     dx, 0x3F8
        mov     al, ah
        out     dx, al
        ret

regs:           times 7 dw 0
txt_booted:     db "disk ", DISK_NAME, " booted: dx=", 0
txt_stack:      db " sssp=", 0
txt_segments:   db " csdses=", 0
txt_flags:      db " if=", 0
txt_mode:       db " mode=", 0
txt_masks:      db " masks=", 0
txt_motor:      db " motor=", 0
txt_vector:     db " vector=", 0
txt_time:       db " ticks=", 0
txt_ticks:      db " ticking", 13, 10, 0

        times   510 - ($ - $$) db 0
        dw      0xAA55
